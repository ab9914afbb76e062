"""Weights & Biases, if the section `logging.wandb` is there: online, or offline beside the run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_prefix.config import Config
from megatron_prefix.errors import InputError, RunError
from megatron_prefix.trackers.run_folder import WANDB_FILE, starting
from megatron_prefix.trackers.tracker import Status

START_SECONDS = 60
"""How long the service may take to answer at the start."""


class WandbTracker:
    """Sends each value under its own key with `step` as the axis.

    The service counts calls, and a step has two: its own and its evaluation's. So the axis is a
    value that is sent too. The run's id is in `logging.output`/wandb.json: a resumed run goes on
    under it, and repeats the steps after the loaded checkpoint.
    """

    def __init__(self) -> None:
        self._run: Any = None
        self._step = 0

    def start(self, config: Config, step: int) -> None:
        settings = config.logging.wandb
        assert settings is not None
        try:
            import wandb
        except ImportError:
            raise InputError(
                "logging.wandb needs the package wandb: pip install wandb, or remove it"
            ) from None
        folder = Path(config.logging.output)
        file = folder / WANDB_FILE
        self._step = step
        try:
            self._run = wandb.init(
                project=settings.project,
                name=settings.name,
                mode=settings.mode,
                dir=str(folder),
                id=_saved_id(file) if step else None,
                resume="allow",
                config=yaml.safe_load(config.to_yaml()),
                settings=wandb.Settings(init_timeout=START_SECONDS, console="off", silent=True),
            )
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
        except Exception as error:  # whatever the service or its client raises
            raise InputError(
                f"logging.wandb: the run could not be started ({' '.join(str(error).split())}); "
                "log in with `wandb login`, or set logging.wandb.mode: offline"
            ) from None
        with starting(config):
            file.write_text(json.dumps({"id": self._run.id}) + "\n", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._step = step
        self._send({"step": step, **values})

    def figure(self, name: str, path: str | Path) -> None:
        import wandb

        self._send({"step": self._step, name: wandb.Image(str(path))})

    def finish(self, status: Status) -> None:
        if self._run is not None:
            try:
                self._run.finish(exit_code=0 if status == "done" else 1)
            except Exception as error:
                raise self._failed(error) from error

    def _send(self, values: dict[str, Any]) -> None:
        try:
            self._run.log(values)
        except Exception as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> RunError:
        return RunError(
            f"logging.wandb: step {self._step} could not be logged ({error}). Resume with "
            "train.load, or with logging.wandb=null"
        )


def _saved_id(file: Path) -> str | None:
    """The id of the run that is resumed; None if it had none."""
    try:
        run_id = json.loads(file.read_text(encoding="utf-8"))["id"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return run_id if isinstance(run_id, str) else None
