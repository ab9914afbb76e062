"""The trackers of a run: which ones the configuration asks for, called together."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_prefix.config import Config
from megatron_prefix.trackers.jsonl import JsonlTracker
from megatron_prefix.trackers.progress import ProgressTracker
from megatron_prefix.trackers.run_folder import open_run_folder
from megatron_prefix.trackers.tensorboard import TensorBoardTracker
from megatron_prefix.trackers.tracker import Status, Tracker
from megatron_prefix.trackers.wandb import WandbTracker


def configured_trackers(config: Config, num_steps: int) -> Trackers:
    """The trackers that the `logging` section asks for, not yet started. metrics.jsonl and the
    progress of the run's `num_steps` steps are always there."""
    chosen: list[Tracker] = [JsonlTracker()]
    if config.logging.tensorboard:
        chosen.append(TensorBoardTracker())
    if config.logging.wandb is not None:
        chosen.append(WandbTracker())
    chosen.append(ProgressTracker(num_steps))
    return Trackers(chosen)


class Trackers:
    """Passes every call on to each tracker in turn; a tracker itself.

    An error of a tracker stops the run: no tracker fails in silence.
    """

    def __init__(self, trackers: Sequence[Tracker] = ()) -> None:
        self._trackers = tuple(trackers)

    def start(self, config: Config, step: int) -> None:
        """Make the run's folder ready, then start the trackers. If one fails to start, those
        before it are finished as of a failed run."""
        open_run_folder(config, step)
        for number, tracker in enumerate(self._trackers):
            try:
                tracker.start(config, step)
            except BaseException:
                Trackers(self._trackers[:number]).finish("failed")
                raise

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log(step, values)

    def figure(self, name: str, path: str | Path) -> None:
        for tracker in self._trackers:
            tracker.figure(name, path)

    def finish(self, status: Status) -> None:
        """Finish all, the last one first, even if one of them fails.

        The first failure is raised afterwards, and the others are printed. If the run failed
        anyway, its own error matters more, so all of them are printed.
        """
        errors: list[Exception] = []
        for tracker in reversed(self._trackers):
            try:
                tracker.finish(status)
            except Exception as error:  # the other trackers must finish too
                errors.append(error)
        raised = errors[:1] if status == "done" else []
        for other in errors[len(raised) :]:
            print(f"warning: {other}", file=sys.stderr, flush=True)
        if raised:
            raise raised[0]
