"""Warning if the chosen responses lose probability: preference losses only pull chosen and rejected
apart, so both may fall (Pal et al. 2024, arXiv 2402.13228; Razin et al. 2024, arXiv 2410.08847).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence

WINDOW = 20
"""Steps that are looked at together."""
NATS = 1.0
"""A response on average."""
ERRORS = 3.0
"""Standard errors that the fall must exceed this by."""


class FallingWatch:
    """Watches the metrics of a run's steps, and warns once.

    With a reference the chosen log-probabilities are compared with the reference's; without one,
    with those of the first `WINDOW` steps since the run was started or resumed.
    """

    def __init__(self) -> None:
        self._recent: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        self._first: list[tuple[float, float]] = []
        self._has_warned = False

    def warning(self, step: int, means: Mapping[str, float]) -> str | None:
        """The warning after step `step`, counted from 1, if its metrics are the reason for one."""
        has_reference = "logratios/chosen" in means
        name = "logratios" if has_reference else "logps"
        if self._has_warned or f"{name}/chosen" not in means:
            return None
        values = means[f"{name}/chosen"], means[f"{name}/rejected"]
        if not has_reference and len(self._first) < WINDOW:
            self._first.append(values)
            return None
        self._recent.append(values)
        if len(self._recent) < WINDOW:
            return None
        chosen, error = mean_and_error([x for x, _ in self._recent])
        rejected = math.fsum(x for _, x in self._recent) / WINDOW
        if not has_reference:
            before, other_error = mean_and_error([x for x, _ in self._first])
            chosen, error = chosen - before, math.hypot(error, other_error)
            rejected -= math.fsum(x for _, x in self._first) / WINDOW
        if chosen + ERRORS * error > -NATS:
            return None
        self._has_warned = True
        against = "the reference" if has_reference else f"the first {WINDOW} steps"
        return (
            f"warning: step {step}: the chosen responses become less likely. Over the last "
            f"{WINDOW} steps their log-probability was {chosen:+.2f} nats against {against} on "
            f"average, that of the rejected ones {rejected:+.2f}. If this is not intended, add sft "
            "to loss.loss_type, set loss.dpop_lambda (sigmoid), or lower optimizer.lr"
        )


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; 1, 2 and 3: 2 and sqrt(1 / 3)."""
    mean = math.fsum(values) / len(values)
    squares = math.fsum((x - mean) ** 2 for x in values)
    return mean, math.sqrt(squares / (len(values) - 1) / len(values))
