"""What the lora section must agree on with the model and the objective."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_prefix.config.lora.section import (
    ALL_LINEAR,
    FEED_FORWARD_TARGETS,
    LATENT_TARGETS,
    LoraConfig,
)
from megatron_prefix.config.model import ModelSizes


def lora_faults(lora: LoraConfig, kind: str) -> Iterator[str]:
    """Settings that exclude each other; `kind` is `model.kind`."""
    if lora.reference is not None and kind == "reward":
        yield (
            f"lora.reference = {lora.reference} with model.kind: reward, which has no reference: "
            "leave it out"
        )
    elif lora.reference is not None and lora.adapter is None:
        yield (
            f"lora.reference = {lora.reference} without lora.adapter: training then starts from "
            "the base, so both are the same; leave lora.reference out, or give lora.adapter"
        )
    if kind == "reward" and "lm_head" in (lora.modules_to_save or ()):
        yield (
            "lora.modules_to_save = lm_head with model.kind: reward, which has a reward head "
            "instead; that is always trained: leave lm_head out"
        )


def lora_size_faults(lora: LoraConfig, sizes: ModelSizes, kind: str) -> Iterator[str]:
    """Settings that do not fit the sizes of the model."""
    targets = lora.resolved(sizes.num_moe_experts > 0).target_modules or ()
    given = f"lora.target_modules = {lora.target_modules or ALL_LINEAR}"
    latent = sizes.architecture.latent
    own: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    if latent is not None:
        own = ("q_proj", *LATENT_TARGETS[2:]) if latent.query_rank is None else LATENT_TARGETS
    own = (*own, "o_proj", *(FEED_FORWARD_TARGETS if latent is None else ()))
    if refused := [name for name in targets if name not in own]:
        kind = "with" if latent is not None else "without"
        yield (
            f"{given}: a model {kind} multi-latent attention has no adapters of "
            f"{', '.join(refused)}: name some of {', '.join(own)}"
        )
    refused = [name for name in targets if name in FEED_FORWARD_TARGETS]
    if sizes.architecture.dense_layers and refused and latent is None:
        yield (
            f"{given}: the first {sizes.architecture.dense_layers} layers of the model have no "
            "experts, and the others have: adapters of both kinds of feed-forward layers are not "
            "supported: name layers of attention only"
        )
    if lora.layers_to_transform and max(lora.layers_to_transform) >= sizes.num_layers:
        yield (
            f"lora.layers_to_transform = {list(lora.layers_to_transform)}: the model has layers 0 "
            f"to {sizes.num_layers - 1}"
        )
    if lora.modules_to_save and kind == "lm" and not sizes.untie_embeddings_and_output_weights:
        yield (
            f"lora.modules_to_save = {list(lora.modules_to_save)}: the model's embedding and its "
            "output layer are one matrix, which a trained copy of one of them would divide: leave "
            "it out"
        )
