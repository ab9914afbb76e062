"""Canonical names of parameters: those of the whole, unsharded model with local layers.

A rank numbers the layers of its pipeline stage and the experts that it holds from 0, and
Transformer Engine fuses norms into the linear layers after them. Seeds, checkpoints and files of
Hugging Face go by the canonical name, which is the same in every layout.
"""

from __future__ import annotations

import re

EMBEDDING, OUTPUT_LAYER = "embedding.word_embeddings.weight", "output_layer.weight"
VISION = "vision.model."
"""Before the name that a parameter of the vision part has in transformers' module."""
SAVED_MODULES, ADAPTERS = "saved_modules.", ".adapters."
SAVED_EMBEDDING = f"{SAVED_MODULES}embed_tokens.word_embeddings.weight"
SAVED_OUTPUT_LAYER = f"{SAVED_MODULES}lm_head.weight"
"""Copies of the two that `lora.modules_to_save` trains."""
VOCABULARY = (EMBEDDING, OUTPUT_LAYER, SAVED_EMBEDDING, SAVED_OUTPUT_LAYER)
"""Matrices with one row per token of the vocabulary, which may be padded."""
REWARD_HEAD = "score.weight"
"""A reward model's head; Megatron-Core, checkpoints and Hugging Face name it the same."""
SINKS = "self_attention.core_attention.softmax_offset"
"""The sinks of a layer, one for each query head."""
TRANSFORMER_ENGINE_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_bias": "input_layernorm.bias",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "mlp.linear_fc1.layer_norm_bias": "pre_mlp_layernorm.bias",
}
"""Norms that Transformer Engine fuses, and their names in Megatron-Core's local layers."""
_LOCAL_EXPERT = re.compile(r"mlp\.experts\.(?:local_experts\.(\d+)\.(.+)|(.+\.weight)(\d+))")
"""An expert of this rank: a module each, or Transformer Engine's `linear_fc1.weight0`."""


def is_expert(name: str) -> bool:
    """Whether a canonical parameter belongs to one expert of a mixture."""
    return ".mlp.experts." in name


def is_added(name: str) -> bool:
    """Whether a parameter is no part of the base model: an adapter's factor, or a trained copy."""
    return ADAPTERS in name or name.startswith(SAVED_MODULES)


def layer_and_part(name: str) -> tuple[int, str]:
    """`decoder.layers.2.mlp.linear_fc2.weight` -> (2, "mlp.linear_fc2.weight")."""
    _, _, layer, part = name.split(".", 3)
    return int(layer), part


def canonical_name(name: str, layer_offset: int = 0, first_expert: int = 0) -> str:
    """The name in the whole model with local layers of a rank's parameter.

    In a stage after 2 layers, Transformer Engine's
    `decoder.layers.0.self_attention.linear_qkv.layer_norm_weight` is
    `decoder.layers.2.input_layernorm.weight`. On a rank whose first expert is 4, its expert 1,
    `….mlp.experts.local_experts.1.linear_fc2.weight`, is `….mlp.experts.5.linear_fc2.weight`.
    """
    if not name.startswith("decoder.layers."):
        return name
    layer, part = layer_and_part(name)
    if match := _LOCAL_EXPERT.fullmatch(part):
        local, own, grouped_own, grouped = match.groups()
        part = f"mlp.experts.{int(local or grouped) + first_expert}.{own or grouped_own}"
    return f"decoder.layers.{layer + layer_offset}.{TRANSFORMER_ENGINE_NAMES.get(part, part)}"
