"""The interface of a tracker: a class that receives the metrics of one run.

To add a tracker, write one file with a class of these four methods, add the key that switches it on
to `LoggingConfig` (config/schema.py), and one line to `configured_trackers` (several.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Protocol

from megatron_prefix.config import Config

Status = Literal["done", "stopped", "failed"]
"""How a run ended: after its last step, by a signal, or with an error."""


class Tracker(Protocol):
    """Receives a run's metrics: `start`, then `log` and `figure` as often as needed, `finish`.

    Only the main process has trackers. Errors: raise InputError in `start`, RunError in the other
    methods. The message names the setting that switches the tracker on.
    """

    def start(self, config: Config, step: int) -> None:
        """Begin before the first step, or continue after `step` of a resumed run.

        `step` is 0 for a new run. In a resumed run it is the step of the loaded checkpoint. What
        was logged for later steps is no longer valid. A service that gives each run an id can
        keep it in a file in `logging.output` and read it again if `step` is not 0.
        """

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the values of a training step, or of an evaluation after it (keys `eval_…`)."""

    def figure(self, name: str, path: str | Path) -> None:
        """Take the PNG file `path`, drawn after the step that was logged last."""

    def finish(self, status: Status) -> None:
        """End the run. Nothing is called after it."""
