"""TensorBoard: event files in `logging.output`/tensorboard, if `logging.tensorboard` is true."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_prefix.config import Config
from megatron_prefix.trackers.run_folder import TENSORBOARD_FOLDER, starting, writing
from megatron_prefix.trackers.tracker import Status

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardTracker:
    """Writes each value as a scalar under its own key, and each figure as an image.

    A resumed run hides what was logged after the loaded step.
    """

    def __init__(self) -> None:
        self._folder, self._step = Path(), 0
        self._board: SummaryWriter | None = None

    def start(self, config: Config, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder, self._step = Path(config.logging.output), step
        purge = step + 1 if step else None  # the first step that TensorBoard hides
        with starting(config):
            path = str(self._folder / TENSORBOARD_FOLDER)
            self._board = SummaryWriter(path, purge_step=purge)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        assert self._board is not None, "log before start"
        self._step = step
        with writing(self._folder, step):
            for key, value in values.items():
                self._board.add_scalar(key, value, step)
            self._board.flush()

    def figure(self, name: str, path: str | Path) -> None:
        from PIL import Image

        assert self._board is not None, "figure before start"
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        with writing(self._folder, self._step):
            self._board.add_image(name, pixels, self._step, dataformats="HWC")
            self._board.flush()

    def finish(self, status: Status) -> None:
        if self._board is not None:
            with writing(self._folder, self._step):
                self._board.close()
