"""A window of steps that torch's profiler records: `train.profile`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_prefix.config import Config
from megatron_prefix.errors import InputError, RunError
from megatron_prefix.text import counted
from megatron_prefix.trackers import RunFile


def check_window(config: Config, num_steps: int) -> None:
    """Refuse a window that goes beyond the run. Raises InputError."""
    if config.train.profile is not None and config.train.profile[1] > num_steps:
        first, last = config.train.profile
        raise InputError(
            f"train.profile = [{first}, {last}] and the run has {counted(num_steps, 'step')}: name "
            "steps of the run"
        )


class StepProfiler:
    """Records the steps of the window on one process, and writes them after the last of them.

    `step` is that from which the run continues; what it has passed of the window is not recorded.
    """

    def __init__(self, config: Config, step: int, is_main: bool) -> None:
        window = config.train.profile
        self._folder = Path(config.logging.output)
        self._window = window if is_main else None
        self._profile: Any = None
        if window is None:
            return
        first, last = window
        if step >= first and is_main:
            recorded = "nothing is" if step >= last else f"steps {step + 1} to {last} are"
            print(
                f"train.profile = [{first}, {last}] and the run continues after step {step}: "
                f"{recorded} recorded",
                flush=True,
            )

    @contextmanager
    def recording(self, step: int) -> Iterator[None]:
        """Around step `step`, counted from 1. Raises RunError if the file cannot be written."""
        if self._window is None or not self._window[0] <= step <= self._window[1]:
            yield
            return
        if self._profile is None:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profile = torch.profiler.profile(activities=activities)
            self._profile.start()
        with torch.profiler.record_function(f"step {step}"):
            yield
        if step == self._window[1]:
            self._write()

    def close(self) -> None:
        """Write what was recorded if the run ends within the window."""
        if self._profile is not None:
            self._write()

    def _write(self) -> None:
        profile, self._profile = self._profile, None
        profile.stop()
        partial = self._folder / f"partial-{RunFile.PROFILE}"
        try:
            profile.export_chrome_trace(str(partial))
            os.replace(partial, self._folder / RunFile.PROFILE)
        except OSError as error:
            raise RunError(
                f"logging.output = {self._folder}: {RunFile.PROFILE} could not be written "
                f"({error}). Free some space, and resume with train.load"
            ) from error
