"""What a checkpoint and the run that loads it must agree on, and how a difference is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_prefix.errors import InputError

RUN, SCHEDULE, MODEL, OBJECTIVE = "run", "schedule", "model_sizes", "objective_state"
"""Entries of a checkpoint beside its tensors: settings that must stay, settings that may change,
the model's sizes, and what the objective keeps."""
EARLIER = {
    "loss.comparisons": "all",
    "loss.references": None,
    "data.sharing": None,
    "data.row_capacity": None,
    "data.packing_method": None,
    "data.sort_by_length": False,
    "data.train weights": None,
    "data.train epochs": None,
    "reference model fingerprint": None,
}
"""What a run had whose checkpoint does not name the setting."""
_REMEDIES = {
    "run": "resume with the same settings, or start from its weights with model.checkpoint",
    "model": "give the sizes and the data set's tokenizer that it was trained with",
}


def check_run(path: Path, saved: object, ours: dict[str, Any]) -> list[str]:
    """Refuse a checkpoint of a run with other settings, and name every difference.

    Settings are compared by value. Returns those of `ours` that the checkpoint does not name and
    that have no value in EARLIER: they cannot be compared.
    """
    saved = {**EARLIER, **saved} if isinstance(saved, dict) else {}
    unnamed = [key for key in ours if key not in saved and key.startswith("loss.")] if saved else []
    compared = {key: value for key, value in ours.items() if key not in unnamed}
    _check_equal(path, "run", saved, {**EARLIER, **compared})
    return unnamed


def check_model(path: Path, saved: object, ours: dict[str, Any]) -> None:
    """Refuse a checkpoint of a model with other sizes, and name every difference."""
    saved = saved if isinstance(saved, dict) else {}
    _check_equal(path, "model", _without_unset(saved), _without_unset(ours))


def _without_unset(sizes: dict[str, Any]) -> dict[str, Any]:
    """The same without settings of `rope_scaling` that are None: older checkpoints know fewer."""
    return {
        key: {k: x for k, x in value.items() if x is not None} if isinstance(value, dict) else value
        for key, value in sizes.items()
    }


def schedule_changes(saved: object, ours: dict[str, Any]) -> list[str]:
    """The settings of optimizer and schedule with another value than in the checkpoint, as text.

    A resumed run may change them. Older checkpoints do not name them.
    """
    if not isinstance(saved, dict):
        return []
    return _differences(saved, {key: value for key, value in ours.items() if key in saved})


def _check_equal(path: Path, owner: str, saved: dict, ours: dict) -> None:
    if differing := _differences(saved, ours):
        raise InputError(
            f"{path}: saved by another {owner} ({', '.join(differing)}); {_REMEDIES[owner]}"
        )


def _differences(saved: dict, ours: dict) -> list[str]:
    return [
        f"{key}: {saved.get(key)!r} in the checkpoint, {ours.get(key)!r} now"
        for key in {**ours, **saved}
        if saved.get(key) != ours.get(key)
    ]
