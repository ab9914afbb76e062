"""Which checkpoints of a run stay: the newest ones, and the best by a metric.

ROOT/best_checkpoint.json    {"step": 40, "metric": "eval_rewards/accuracies", "value": 0.71}
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_prefix.errors import InputError

BEST = "best_checkpoint.json"


@dataclass(frozen=True, kw_only=True)
class Keeping:
    """What a run keeps of its checkpoints."""

    last: int | None = None
    """The newest ones that stay; None: all."""
    metric: str | None = None
    """A metric of the evaluation; the checkpoint with the best value stays, too."""
    mode: Literal["max", "min"] = "max"

    def value(self, metrics: Mapping[str, float]) -> float | None:
        """The metric's value in an evaluation. Raises InputError if it has no such metric."""
        if self.metric is None:
            return None
        if self.metric not in metrics:
            raise InputError(
                f"train.keep_best.metric = {self.metric}: the evaluation has no such metric; it "
                f"has {', '.join(sorted(metrics))}"
            )
        return float(metrics[self.metric])

    def is_better(self, value: float, than: float) -> bool:
        """Whether a value is better than an earlier one; of equals the earlier one is kept."""
        return value > than if self.mode == "max" else value < than


def note_best(root: Path, step: int, value: float, keeping: Keeping) -> None:
    """Write that the checkpoint of `step` is the best one, if it is. Raises OSError."""
    best = read_best(root)
    if best is not None and best["metric"] == keeping.metric:
        is_earlier = best["step"] < step
        if is_earlier and not keeping.is_better(value, best["value"]):
            return
    partial = root / f".{BEST}"
    text = json.dumps({"step": step, "metric": keeping.metric, "value": value})
    with partial.open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, root / BEST)


def read_best(root: Path) -> dict | None:
    """What BEST says, or None if it is absent, damaged, or its checkpoint is gone."""
    try:
        best = json.loads((root / BEST).read_text(encoding="utf-8"))
        step, value, metric = best["step"], float(best["value"]), str(best["metric"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if not isinstance(step, int) or step < 1:
        return None
    return {"step": step, "metric": metric, "value": value}


def surplus(steps: list[int], newest: int, best: int | None, last: int | None) -> list[int]:
    """The steps whose checkpoints go, with the newest at `newest`: of 10, 20, 30, 40 and 50, of
    which 20 is the best and the last two stay, these are 10 and 30. Checkpoints of later steps,
    from before the run went back, stay."""
    if last is None:
        return []
    up_to_newest = sorted(step for step in steps if step <= newest)
    return [step for step in up_to_newest[:-last] if step != best]
