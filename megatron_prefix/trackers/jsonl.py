"""Metrics of a run: one JSON line a step, TensorBoard, and what a person sees meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path

from tqdm import tqdm

from megatron_prefix.errors import InputError

METRICS_FILE = "metrics.jsonl"
PLAIN_INTERVAL_S = 10.0
"""Seconds between progress lines where the output is not a terminal."""


def read_metrics(run: str | Path) -> list[dict]:
    """All complete lines of a run's metrics file. Raises InputError where there are none."""
    path = Path(run)
    path = path / METRICS_FILE if path.is_dir() else path
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a run's metrics ({error})") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            row["step"]
        except (ValueError, TypeError, KeyError):
            if number == len(lines):
                break  # torn by a kill
            raise InputError(f"{path}, line {number}: not a metrics line") from None
        rows.append(row)
    if not rows:
        raise InputError(f"{path}: no complete line; give the directory of a run that has begun")
    return rows


class MetricsWriter:
    """Appends to `metrics.jsonl` of a run's directory.

    `resumed_step` is the step the run goes on from: later lines, and a torn last one, are cut
    off. With None the run is a new one, and what an earlier run left is kept as
    `metrics-1.jsonl`, `config-1.yaml` and `tensorboard-1` (or the next free number).
    """

    def __init__(self, output: str, *, resumed_step: int | None, tensorboard: bool) -> None:
        directory = Path(output)
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / METRICS_FILE
        if path.exists() and resumed_step is None:
            _keep(directory)
        elif path.exists():
            _cut_back(path, resumed_step)
        self._file = path.open("a", encoding="utf-8")
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # TensorBoard hides from `purge_step` on, that step included.
            purge = None if resumed_step is None else resumed_step + 1
            self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=purge)

    def write(self, row: dict) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._board is not None:
            for key, value in row.items():
                if key != "step":
                    self._board.add_scalar(key, value, row["step"])
            self._board.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what it could not take has been said by write
            self._file.close()
        if self._board is not None:
            self._board.close()


def _keep(directory: Path) -> None:
    """Rename what an earlier run wrote."""
    number = 1
    while (directory / f"metrics-{number}.jsonl").exists():
        number += 1
    for name in ("config.yaml", "tensorboard", METRICS_FILE):
        path = directory / name
        if path.exists():
            os.replace(path, path.with_name(f"{path.stem}-{number}{path.suffix}"))


def _cut_back(path: Path, step: int) -> None:
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        with contextlib.suppress(ValueError, TypeError, KeyError):
            if line.endswith(b"\n") and json.loads(line)["step"] <= step:
                kept.append(line)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(b"".join(kept))
    os.replace(temporary, path)


class Progress:
    """A bar on a terminal, a plain line every ten seconds elsewhere; `shown` False is silent."""

    def __init__(self, total: int, done: int = 0, *, shown: bool = True) -> None:
        self._total, self._done, self._first = total, done, done
        self._shown, self._last, self._seconds = shown, float("-inf"), 0.0
        self._bar = None
        if shown and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True)

    def update(self, row: dict) -> None:
        """Show a step's metrics."""
        self._done += 1
        self._seconds += row["step_time_s"]
        shown = {
            "loss": f"{row['loss']:.4f}",
            "accuracy": f"{row['rewards/accuracies']:.3f}",
            "margin": f"{row['rewards/margins']:.3f}",
            "pairs/s": f"{row['pairs_per_second']:.1f}",
        }
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update()
        elif self._shown and (
            time.monotonic() - self._last >= PLAIN_INTERVAL_S or self._done == self._total
        ):
            self._last = time.monotonic()
            left = self._seconds / (self._done - self._first) * (self._total - self._done)
            text = "  ".join(f"{key} {value}" for key, value in shown.items())
            print(f"step {self._done}/{self._total}  {text}  left {_duration(left)}", flush=True)

    def say(self, text: str) -> None:
        """Print a line without tearing the bar."""
        if self._bar is not None:
            self._bar.write(text)
        elif self._shown:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
