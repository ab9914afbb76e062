"""TensorBoard: event files in `logging.output`/tensorboard, if `logging.tensorboard` is true.

The records are written by this thread. TensorBoard's own writer has a thread that prints a
traceback if the disk is full, besides the error that the run ends with.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from megatron_prefix.config import Config
from megatron_prefix.errors import InputError
from megatron_prefix.trackers.run_folder import TENSORBOARD_FOLDER, starting, writing
from megatron_prefix.trackers.tracker import Status

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary


class TensorBoardTracker:
    """Writes each value as a scalar under its own key, and each figure as an image.

    A resumed run hides what was logged after the loaded step.
    """

    def __init__(self) -> None:
        self._folder, self._step = Path(), 0
        self._file: BinaryIO | None = None

    def start(self, config: Config, step: int) -> None:
        try:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        except ImportError:
            raise InputError(
                "logging.tensorboard = True needs the package tensorboard: pip install tensorboard"
            ) from None
        self._folder, self._step = Path(config.logging.output), step
        with starting(config):
            folder = self._folder / TENSORBOARD_FOLDER
            folder.mkdir(parents=True, exist_ok=True)
            # TensorBoard reads the files of a folder in the order of their names.
            name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
            self._file = (folder / name).open("xb")
            self._write(Event(file_version="brain.Event:2"))
            if step:  # TensorBoard hides what it has from the next step on
                begins = SessionLog(status=SessionLog.START)
                self._write(Event(step=step + 1, session_log=begins))
            self._file.flush()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from torch.utils.tensorboard.summary import scalar

        self._step = step
        with writing(self._folder, step):
            for key, value in values.items():
                self._add(scalar(key, value))
            self._flush()

    def figure(self, name: str, path: str | Path) -> None:
        from PIL import Image
        from torch.utils.tensorboard.summary import image

        with Image.open(path) as opened:
            pixels = np.asarray(opened.convert("RGB"))
        with writing(self._folder, self._step):
            self._add(image(name, pixels, dataformats="HWC"))
            self._flush()

    def finish(self, status: Status) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # `log` has raised for what did not fit
                self._file.close()

    def _add(self, summary: Summary) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._write(Event(step=self._step, summary=summary))

    def _write(self, event: Event) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        assert self._file is not None, "log before start"
        event.wall_time = time.time()
        RecordWriter(self._file).write(event.SerializeToString())

    def _flush(self) -> None:
        assert self._file is not None, "log before start"
        self._file.flush()
