"""What a language model's configuration and a reward model's have not in common."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_prefix.config.schema import Config

REWARD_LOSS = {"loss_type": "bradley_terry", "reference": "none"}
"""Defaults of the loss section with `model.kind: reward`."""
NOT_OF_REWARD = (
    ("model", "untie_embeddings_and_output_weights"),
    ("model", "lm_head_chunk_size"),
    ("loss", "beta"),
    ("loss", "label_smoothing"),
    ("loss", "ref_logps"),
)
"""Settings that say nothing of a model without output layer and reference."""


def with_kind_defaults(raw: dict[str, Any]) -> dict[str, Any]:
    """`raw` with the defaults of its `model.kind` where they are not those of the dataclasses."""
    if _given(raw, "model").get("kind") != "reward" or not isinstance(raw.get("loss", {}), dict):
        return raw
    return {**raw, "loss": {**REWARD_LOSS, **raw.get("loss", {})}}


def kind_faults(config: Config, raw: dict[str, Any]) -> Iterator[str]:
    """Settings of the other kind of model; `raw` are the settings as given."""
    loss = config.loss
    if config.model.kind == "reward":
        for section, key in NOT_OF_REWARD:
            if (value := _given(raw, section).get(key)) is not None:
                yield f"{section}.{key} = {value!r}: a reward model has none; remove it"
        for key, value in REWARD_LOSS.items():
            if getattr(loss, key) != value:
                yield (
                    f"loss.{key} = {getattr(loss, key)}: with model.kind: reward it is {value}; "
                    "leave it out"
                )
        return
    for key, value in REWARD_LOSS.items():
        if getattr(loss, key) == value:
            yield f"loss.{key} = {value}: needs model.kind: reward"
    for key in ("margin", "center_rewards_coefficient"):
        if getattr(loss, key):
            yield f"loss.{key} = {getattr(loss, key)}: needs model.kind: reward"


def _given(raw: dict[str, Any], section: str) -> dict[str, Any]:
    found = raw.get(section)
    return found if isinstance(found, dict) else {}
