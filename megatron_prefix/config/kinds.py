"""What a reward model's configuration has of its own; the loss section's rules are objectives'."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

REWARD_LOSS = {"loss_type": "bradley_terry"}
"""Defaults of the loss section with `model.kind: reward`."""
NOT_OF_REWARD = (
    ("model", "untie_embeddings_and_output_weights"),
    ("model", "lm_head_chunk_size"),
)
"""Settings of the output layer, which a reward model does not have."""


def with_kind_defaults(raw: dict[str, Any]) -> dict[str, Any]:
    """`raw` with the defaults of its `model.kind` if they are not those of the dataclasses."""
    if _given(raw, "model").get("kind") != "reward" or not isinstance(raw.get("loss", {}), dict):
        return raw
    return {**raw, "loss": {**REWARD_LOSS, **raw.get("loss", {})}}


def kind_faults(kind: str, raw: dict[str, Any]) -> Iterator[str]:
    """Settings of the other `model.kind`; `raw` are the settings as given."""
    if kind == "reward":
        for section, key in NOT_OF_REWARD:
            if (value := _given(raw, section).get(key)) is not None:
                yield f"{section}.{key} = {value!r}: a reward model has none; remove it"


def _given(raw: dict[str, Any], section: str) -> dict[str, Any]:
    settings = raw.get(section)
    return settings if isinstance(settings, dict) else {}
