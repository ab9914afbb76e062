"""What makes two runs the same one: a resumed run must have it, or is told what changed."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from megatron_prefix.config import Config
from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.model import TreeTransformerConfig
from megatron_prefix.objectives import Objective


def run_identity(
    config: Config, objective: Objective, dataset: PreferenceDataset, fingerprint: str | None
) -> dict[str, Any]:
    """The settings that decide the order of the data, the rewards and the loss; a resumed run must
    have the same.

    `fingerprint` is the reference model's, None if there is none.
    """
    data = config.data
    by_rows = data.rows_per_step is not None
    return {
        "data.train fingerprint": dataset.fingerprint,
        "data.seed": data.seed,
        "data.global_batch_size": data.global_batch_size,
        "data.rows_per_step": data.rows_per_step,
        "data.sort_by_length": data.sort_by_length,
        "data.train weights": _as_list(data.weights),
        "data.train epochs": _as_list(data.set_epochs),
        # Packing decides which groups share a step if steps are counted in rows, and only then.
        "data.sharing": data.sharing if by_rows else None,
        "data.row_capacity": data.row_capacity if by_rows else None,
        "data.packing_method": _other_than(data.packing_method, "first-fit") if by_rows else None,
        "data.oversized": _other_than(data.oversized, "error") if by_rows else None,
        "train.epochs": config.train.epochs,
        "reference model fingerprint": fingerprint,
        **_objective_identity(objective),
    }


def vision_identity(config: TreeTransformerConfig) -> dict[str, Any]:
    """What is trained of the part that reads images: the optimizer has state of that only."""
    if config.vision is None:
        return {}
    return {
        "model.vision.freeze_tower": not config.vision.trains_tower,
        "model.vision.freeze_projector": not config.vision.trains_projector,
    }


def run_schedule(config: Config, num_steps: int) -> dict[str, Any]:
    """The settings that a resumed run may change: those of the optimizer, and the number of
    steps."""
    settings = {f"optimizer.{key}": value for key, value in asdict(config.optimizer).items()}
    return {**settings, "steps of the run": num_steps}


def _objective_identity(objective: Objective) -> dict[str, Any]:
    """The loss types, their weights, and every option: a list if several members have it."""
    options: dict[str, list] = {}
    for member in objective.members:
        for name, value in member.options.items():
            options.setdefault(f"loss.{name}", []).append(value)
    return {
        "loss.loss_type": [member.name for member in objective.members],
        "loss.loss_weights": [member.weight for member in objective.members],
        "loss.weighting": objective.weighting if objective.weighs_pairs else None,
        "loss.comparisons": objective.comparisons,
        "loss.ld_alpha": objective.ld_alpha,
        "loss.use_weighting": objective.use_weighting,
        **{name: x[0] if len(x) == 1 else x for name, x in options.items()},
    }


def _as_list(values: tuple[float, ...] | None) -> list[float] | None:
    return None if values is None else list(values)


def _other_than(value: str, default: str) -> str | None:
    return None if value == default else value
