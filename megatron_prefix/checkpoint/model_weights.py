"""A model's weights in a checkpoint: sharded tensors, also loaded without the rest of the state."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megatron_prefix.checkpoint import torch_dist
from megatron_prefix.checkpoint.adapter_state import (
    SavedAdapter,
    adapter_state,
    check_adapter,
    refuse_as_base,
)
from megatron_prefix.checkpoint.agreement import MODEL, OBJECTIVE, check_model
from megatron_prefix.config.parts import Architecture
from megatron_prefix.errors import InputError
from megatron_prefix.model import REWARD_HEAD, TreeTransformerConfig, unwrap
from megatron_prefix.model.adapters import is_added

_OF_HEADS = ("kind", "untie_embeddings_and_output_weights")
"""Keys of `model_sizes` that describe the head."""


def load_only_weights(path: Path, chunks: list[torch.nn.Module], keeps_head: bool) -> dict:
    """Load the weights of the checkpoint in the folder `path`, and return what its objective kept;
    adapters stay as they are. Collective.

    With `keeps_head`, a reward model loads a language model's checkpoint and keeps its own head.
    Of another program's checkpoint only the tensors are read, so only their names and shapes are
    compared with this model. Raises InputError.
    """
    ours = model_sizes(chunks)
    common = {} if torch_dist.is_foreign(path) else torch_dist.load_common(path)
    refuse_as_base(path, SavedAdapter.read(common, path))
    saved = common.get(MODEL)
    state = model_state(chunks)
    unread: tuple[str, ...] = ()
    if keeps_head:
        unread = ("output_layer.weight",)
        state = {name: _without_head(tensors) for name, tensors in state.items()}
        ours = {key: value for key, value in ours.items() if key not in _OF_HEADS}
        saved = saved and {key: value for key, value in saved.items() if key not in _OF_HEADS}
    else:
        check_kind(path, ours["kind"])
    if saved is not None:
        check_model(path, saved, ours)
    load_model(chunks, torch_dist.load(state, path, unread))
    return dict(common.get(OBJECTIVE, {}))


def load_only_adapters(path: Path, chunks: list[torch.nn.Module], adapter: SavedAdapter) -> dict:
    """Load the adapters of the checkpoint in the folder `path`, which must be those of `adapter`,
    and return what its objective kept. Collective. Raises InputError."""
    common = torch_dist.load_common(path)
    check_adapter(path, SavedAdapter.read(common, path), adapter)
    check_kind(path, model_sizes(chunks)["kind"])
    check_model(path, common.get(MODEL), model_sizes(chunks))
    load_model(chunks, torch_dist.load(trained_state(chunks), path, common=common))
    return dict(common.get(OBJECTIVE, {}))


def _without_head(tensors: dict) -> dict:
    return {name: x for name, x in tensors.items() if name != REWARD_HEAD}


def check_kind(path: Path, kind: str) -> None:
    """Refuse a checkpoint of the other `model.kind`. Raises InputError."""
    saved = torch_dist.model_kind(path)
    if (saved, kind) == ("reward", "lm"):
        raise InputError(
            f"{path}: a reward model's checkpoint has no language-model head, but model.kind is "
            "lm: set model.kind: reward, or give a language model's checkpoint"
        )
    if (saved, kind) == ("lm", "reward"):
        raise InputError(
            f"{path}: a language model's checkpoint has no reward head, but model.kind is reward: "
            "give a reward model's checkpoint, or train one from this one with model.checkpoint"
        )


def model_state(chunks: list[torch.nn.Module]) -> dict:
    """Sharded tensors of the models' parameters, to save or to request; without adapters."""
    states = {name: model.sharded_state_dict() for name, model in _named(chunks).items()}
    if unwrap(chunks[0]).config.lora is not None:
        states = {
            name: {key: x for key, x in state.items() if not is_added(key)}
            for name, state in states.items()
        }
    return torch_dist.tensors_only(states)


def trained_state(chunks: list[torch.nn.Module]) -> dict:
    """Sharded tensors of what is trained: all parameters, or adapters."""
    if unwrap(chunks[0]).config.lora is None:
        return model_state(chunks)
    return {name: adapter_state(model) for name, model in _named(chunks).items()}


def _named(chunks: list[torch.nn.Module]) -> dict[str, Any]:
    """The models without wrappers, by the names of their states."""
    # Two virtual chunks per stage are saved as `model0` and `model1`, one chunk as `model`.
    names = ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]
    return {name: unwrap(chunk) for name, chunk in zip(names, chunks, strict=True)}


def model_sizes(chunks: list[torch.nn.Module]) -> dict:
    """Sizes and settings that give the weights their meaning: a checkpoint must have the same."""
    return sizes_of(unwrap(chunks[0]).config)


def sizes_of(config: TreeTransformerConfig) -> dict:
    """`model_sizes` of models with this configuration."""
    scaling = config.rope_scaling
    return {
        "kind": config.kind,
        "vocab_size": config.vocab_size,
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.moe_ffn_hidden_size or config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_query_groups,
        "kv_channels": config.kv_channels,
        "rotary_base": config.rotary_base,
        "rope_scaling": None if scaling is None else dict(vars(scaling)),
        "norm_epsilon": config.layernorm_epsilon,
        "add_qkv_bias": config.add_qkv_bias,
        "qk_layernorm": config.qk_layernorm,
        "untie_embeddings_and_output_weights": not config.share_embeddings_and_output_weights,
        **_expert_sizes(config),
        **_attention_settings(config),
        **_parts(config.architecture),
        **({"num_labels": config.num_labels} if config.num_labels > 1 else {}),
        **({"vision": config.vision.fingerprint} if config.vision is not None else {}),
    }


def _expert_sizes(config: TreeTransformerConfig) -> dict:
    if config.num_moe_experts is None:
        return {}
    return {
        "num_moe_experts": config.num_moe_experts,
        "moe_router_topk": config.moe_router_topk,
        "moe_router_pre_softmax": config.moe_router_pre_softmax,
    }


def _attention_settings(config: TreeTransformerConfig) -> dict:
    """Windows, soft cap and sinks, if the model has them."""
    window, kinds = config.window_size, config.window_attn_skip_freq
    settings = {
        "window_size": None if window is None else list(window),
        "window_attn_skip_freq": kinds,
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "softmax_type": None if config.softmax_type == "vanilla" else config.softmax_type,
    }
    return {key: value for key, value in settings.items() if value is not None}


def _parts(parts: Architecture) -> dict:
    """The parts that differ from Llama's, as plain values."""
    plain = asdict(Architecture())
    own = {key: value for key, value in asdict(parts).items() if value != plain[key]}
    return {"architecture": own} if own else {}


def load_model(chunks: list[torch.nn.Module], state: dict) -> None:
    """Put loaded tensors into the models; `state` was loaded as `model_state` or `trained_state`
    requests it. Other parameters stay."""
    for name, model in _named(chunks).items():
        # a stage without adapters has no state
        model.load_state_dict(state.get(name, {}), strict=False)
