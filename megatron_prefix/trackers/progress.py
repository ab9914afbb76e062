"""Progress of a run on the terminal: a bar, or plain lines if the output is not a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from megatron_prefix.config import Config
from megatron_prefix.text import counted, duration
from megatron_prefix.trackers.tracker import Status

PLAIN_INTERVAL_S = 10.0
"""Seconds between plain progress lines."""
EVALUATION = "eval_"
"""How the keys of an evaluation begin."""
SHOWN = (
    ("loss", "loss", 4),
    ("accuracy", "rewards/accuracies", 3),
    ("margin", "rewards/margins", 3),
)
"""Name on the terminal, key of the value, decimals. A value that the run lacks is left out."""


class ProgressTracker:
    """Shows loss, accuracy, margin, throughput and remaining time of a run of `num_steps` steps.

    On a terminal this is a bar, otherwise one line every ten seconds and one for the last step.
    An evaluation gets a line of its own, and so does the path of a figure.
    """

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._first = self._done = 0
        self._last_line, self._seconds = float("-inf"), 0.0
        self._bar: tqdm | None = None

    def start(self, config: Config, step: int) -> None:
        self._first = self._done = step
        if sys.stderr.isatty():
            self._bar = tqdm(total=self._num_steps, initial=step, unit="step", dynamic_ncols=True)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if any(key.startswith(EVALUATION) for key in values):
            self._print(_evaluation_line(step, values))
            return
        if step > self._first + 1:  # the first step of a process takes longer
            self._seconds += values["step_time_s"]
        shown = _shown(values)
        if "pairs_per_second" in values:
            shown["pairs/s"] = f"{values['pairs_per_second']:.1f}"
        advance, self._done = step - self._done, step
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(advance)
        elif time.monotonic() - self._last_line >= PLAIN_INTERVAL_S or step == self._num_steps:
            self._last_line = time.monotonic()
            text = "  ".join(f"{name} {value}" for name, value in shown.items())
            if (timed := step - self._first - 1) > 0:
                left = self._seconds / timed * (self._num_steps - step)
                text += f"  left {duration(left)}"
            self._print(f"step {step}/{self._num_steps}  {text}")

    def figure(self, name: str, path: str | Path) -> None:
        self._print(f"figure {name}: {path}")

    def finish(self, status: Status) -> None:
        if self._bar is not None:
            self._bar.close()

    def _print(self, text: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)


def _shown(values: Mapping[str, float], prefix: str = "") -> dict[str, str]:
    return {
        name: f"{values[prefix + key]:.{decimals}f}"
        for name, key, decimals in SHOWN
        if prefix + key in values
    }


def _evaluation_line(step: int, values: Mapping[str, float]) -> str:
    text = ", ".join(f"{name} {value}" for name, value in _shown(values, EVALUATION).items())
    num_pairs = values.get(f"{EVALUATION}num_pairs")
    over = "" if num_pairs is None else f" over {counted(num_pairs, 'pair')}"
    return f"evaluation at step {step}: {text}{over}"
