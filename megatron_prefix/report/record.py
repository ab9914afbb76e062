"""What a run's folder has, read for a page: settings, versions, metrics, examples, pictures."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_prefix.trackers import (
    RunFile,
    read_metrics,
    read_resumes,
    read_samples,
)

MOST_PICTURE_BYTES = 2**22
COUNTED = {"tokens": "tokens/executed", "seconds": "step_time_s"}
"""Axes besides the step, with the metric that they add up."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run as its folder has it."""

    name: str
    folder: Path
    settings: dict[str, Any]
    """Every setting by its name with the section, e.g. optimizer.lr."""
    versions: dict[str, str]
    steps: list[dict[str, float]]
    """The lines of training steps."""
    evaluations: list[dict[str, float]]
    examples: list[dict[str, Any]] = field(default_factory=list)
    """The pairs of the last evaluation whose margin is worst."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    """Sample answers of the first and the last step that has any."""
    resumes: list[int] = field(default_factory=list)
    """The steps after which the run was resumed."""
    pictures: dict[str, str] = field(default_factory=dict)
    """PNG files of the folder, as data of a page."""

    @classmethod
    def read(cls, folder: str | Path, name: str | None = None) -> RunRecord:
        """Read the folder of a run. Raises InputError if it has no metrics."""
        path = Path(folder)
        lines = read_metrics(path)
        return cls(
            name=name or path.resolve().name,
            folder=path,
            settings=dict(_flat(_read(path / RunFile.CONFIG, yaml.safe_load) or {})),
            versions={str(k): str(v) for k, v in (_read(path / RunFile.VERSIONS) or {}).items()},
            steps=[line for line in lines if "loss" in line],
            evaluations=[line for line in lines if "loss" not in line],
            examples=(_read(path / RunFile.EXAMPLES) or {}).get("pairs", []),
            samples=_first_and_last(read_samples(path)),
            resumes=read_resumes(path),
            pictures=dict(_pictures(path)),
        )

    def series(self, key: str, over: str = "step") -> tuple[list[float], list[float]]:
        """A metric of the training steps over `step`, `tokens` (executed so far) or `seconds`
        (of the steps so far)."""
        xs: list[float] = []
        ys: list[float] = []
        amount = 0.0
        counted = COUNTED.get(over)
        for line in self.steps:
            amount += line.get(counted, 0) if counted else 0
            if isinstance(line.get(key), int | float):
                xs.append(amount if counted else line["step"])
                ys.append(float(line[key]))
        return xs, ys

    def resumed_at(self, over: str = "step") -> list[float]:
        """The places on the axis of `series` at which the run was resumed."""
        counted = COUNTED.get(over)
        if counted is None:
            return [float(step) for step in self.resumes]
        return [
            sum(line.get(counted, 0) for line in self.steps if line["step"] <= step)
            for step in self.resumes
        ]

    def evaluated(self, key: str) -> tuple[list[float], list[float]]:
        """A metric of the evaluations over steps."""
        lines = [line for line in self.evaluations if isinstance(line.get(key), int | float)]
        return [line["step"] for line in lines], [float(line[key]) for line in lines]

    def total(self, key: str) -> float:
        """Sum of a count over the steps."""
        return sum(line.get(key, 0) for line in self.steps)


def _read(path: Path, parse: Any = json.loads) -> dict[str, Any] | None:
    """A file of settings, or None if it is absent or damaged: the page then leaves it out."""
    try:
        value = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    return value if isinstance(value, dict) else None


def _first_and_last(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The samples of these two steps, by prompt."""
    steps = sorted({line["step"] for line in samples})
    shown = [line for line in samples if line["step"] in (steps[0], steps[-1])]
    return sorted(shown, key=lambda line: (line["prompt"], line["kind"], line["step"]))


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value


def _pictures(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.glob("*.png")):
        if path.is_file() and not path.is_symlink() and path.stat().st_size <= MOST_PICTURE_BYTES:
            data = base64.b64encode(path.read_bytes()).decode()
            yield path.name, f"data:image/png;base64,{data}"
