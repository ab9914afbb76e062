"""The folder of a run, `logging.output`: its config.yaml, and files of earlier runs."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from megatron_prefix.config import Config
from megatron_prefix.errors import InputError, RunError

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
WANDB_FILE = "wandb.json"
REPORT_FILE = "report.html"


class RunFile:
    """Files of `logging.output` that others read, besides metrics.jsonl."""

    CONFIG = "config.yaml"
    EXAMPLES = "examples.json"
    """The held-out pairs whose margin is worst."""
    PROFILE = "profile.json.gz"
    """What train.profile records; ui.perfetto.dev and chrome://tracing show it."""
    RESUMES = "resumes.json"
    """The steps after which the run was resumed."""
    SAMPLES = "samples.jsonl"
    """Sample answers of the policy."""
    VERSIONS = "versions.json"


_OF_A_RUN = (
    *(TENSORBOARD_FOLDER, WANDB_FILE, REPORT_FILE, RunFile.CONFIG, RunFile.EXAMPLES),
    *(RunFile.PROFILE, RunFile.RESUMES, RunFile.SAMPLES, RunFile.VERSIONS),
)
_PACKAGES = ("megatron-prefix", "megatron-core", "torch", "transformers", "transformer-engine")


def open_run_folder(config: Config, step: int) -> None:
    """Make `logging.output` and write config.yaml, versions.json and, if a run is resumed,
    resumes.json. A new run (`step` 0) first renames the files of an earlier one. Raises
    InputError."""
    with starting(config):
        folder = Path(config.logging.output)
        folder.mkdir(parents=True, exist_ok=True)
        if not step and (folder / METRICS_FILE).exists():
            _rename_earlier(folder)
        (folder / RunFile.CONFIG).write_text(config.to_yaml(), encoding="utf-8")
        versions = json.dumps(_versions(), indent=1)
        (folder / RunFile.VERSIONS).write_text(versions + "\n", encoding="utf-8")
        if step:
            steps = [*(x for x in read_resumes(folder) if x < step), step]
            (folder / RunFile.RESUMES).write_text(json.dumps({"steps": steps}) + "\n")


def read_resumes(folder: Path) -> list[int]:
    """The steps after which the run was resumed, in order; none if the file is absent or
    damaged."""
    try:
        steps = json.loads((folder / RunFile.RESUMES).read_text(encoding="utf-8"))["steps"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    return [x for x in steps if type(x) is int] if isinstance(steps, list) else []


def _versions() -> dict[str, str]:
    """The versions of what the results depend on, and where the run is."""
    import torch

    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    processes = os.environ.get("WORLD_SIZE", "1")
    return {
        **versions,
        "Python": platform.python_version(),
        "device": device,
        "processes": processes,
    }


def _rename_earlier(folder: Path) -> None:
    """metrics.jsonl -> metrics-1.jsonl, or the next free number; the other files likewise."""
    number = 1
    while (folder / f"metrics-{number}.jsonl").exists():
        number += 1
    for name in (*_OF_A_RUN, METRICS_FILE):
        path = folder / name
        if path.exists():
            stem, dot, kinds = name.partition(".")
            os.replace(path, path.with_name(f"{stem}-{number}{dot}{kinds}"))


@contextlib.contextmanager
def starting(config: Config) -> Iterator[None]:
    """Turns an OSError into the InputError that names `logging.output`."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"logging.output = {config.logging.output}: {error}; name a directory that can be "
            "written"
        ) from None


@contextlib.contextmanager
def writing(folder: Path, step: int) -> Iterator[None]:
    """Turns an OSError into the RunError that names `logging.output` and the step."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"logging.output = {folder}: the metrics of step {step} could not be written "
            f"({error}). Free some space, and resume with train.load"
        ) from error
