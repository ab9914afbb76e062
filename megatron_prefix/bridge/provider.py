"""Bridge's model provider with tree attention."""

from __future__ import annotations

import copy
from dataclasses import fields
from functools import cache
from typing import Any, cast

import torch
from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)

from megatron_prefix import TreeTransformerConfig, model_provider, tree_layer_spec
from megatron_prefix.bridge.settings import (
    FORCED,
    bridge_module,
    fault_of,
    faults,
    field_defaults,
    refuse,
)
from megatron_prefix.config import RopeScaling
from megatron_prefix.config.parts import Architecture


def prefix_layer_spec(config: Any, vp_stage: int | None = None) -> Any:
    """`transformer_layer_spec` of a provider: every layer of every stage is the same."""
    return tree_layer_spec(config, config.tree_attention_backend)


class PrefixProvider:
    """What a wrapped provider has before its own class: Bridge's provider is also the model's
    configuration, so it answers what TreeTransformerConfig answers."""

    kind = "lm"
    moe_count = "tokens"
    architecture = Architecture()
    init_seed = head_seed = adapter_seed = lora = vision = None
    tree_attention_backend = "auto"
    lm_head_chunk_size = 2048
    kernels: tuple[str, ...] = ()
    # Fields of Bridge's provider that are read here.
    rope_scaling_factor: float
    seq_len_interpolation_factor: float | None
    vocab_size: int
    should_pad_vocab: bool
    make_vocab_size_divisible_by: int
    tensor_model_parallel_size: int
    virtual_pipeline_model_parallel_size: int | None
    _pg_collection: Any

    @property
    def rope_scaling(self) -> RopeScaling | None:
        """Bridge's flag and factors as the model's scaling; true if there is scaling."""
        if self.__dict__["rope_scaling"]:  # Megatron-Core has these constants of Llama 3.1
            low, high, length = 1.0, 4.0, 8192
            return RopeScaling(
                type="llama3",
                factor=float(self.rope_scaling_factor),
                low_freq_factor=low,
                high_freq_factor=high,
                original_max_position_embeddings=length,
            )
        if self.seq_len_interpolation_factor is None:
            return None
        return RopeScaling(type="linear", factor=float(self.seq_len_interpolation_factor))

    @rope_scaling.setter
    def rope_scaling(self, value: bool) -> None:
        self.__dict__["rope_scaling"] = value

    @property
    def padded_vocab_size(self) -> int:
        """Bridge's rule: the vocabulary as it is, unless it came from the tokenizer."""
        if not self.should_pad_vocab:
            return self.vocab_size
        multiple = self.make_vocab_size_divisible_by * self.tensor_model_parallel_size
        return -(-self.vocab_size // multiple) * multiple

    def provide(
        self,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> torch.nn.Module:
        """The part of the model that this stage or virtual chunk holds, as Bridge asks for it."""
        refuse(faults(self, prefix_layer_spec))
        size, groups = self.virtual_pipeline_model_parallel_size, self._pg_collection
        if pre_process is None:
            pre_process = is_vp_first_stage(vp_stage, size) and is_pp_first_stage(groups.pp)
        if post_process is None:
            post_process = is_vp_last_stage(vp_stage, size) and is_pp_last_stage(groups.pp)
        self._vp_stage = vp_stage  # Transformer Engine's layers read it
        config = cast(TreeTransformerConfig, self)  # it has every field that the model reads
        return model_provider(
            pre_process, post_process, vp_stage, config=config, pg_collection=groups
        )

    def to_cfg_dict(self) -> dict[str, Any]:
        """For the `run_config.yaml` of a checkpoint: Bridge's own provider, so that Bridge opens
        and exports the checkpoint without this package."""
        plain = type(self).__mro__[2]
        values = {
            f.name: getattr(self, f.name) for f in fields(cast(Any, self)) if f.name[0] != "_"
        }
        values["rope_scaling"] = self.__dict__["rope_scaling"]
        values["transformer_layer_spec"] = field_defaults(plain)["transformer_layer_spec"]
        return {"_target_": f"{plain.__module__}.{plain.__qualname__}", **values}


@cache
def _prefixed(provider_class: type) -> type:
    return type(f"Prefix{provider_class.__name__}", (PrefixProvider, provider_class), {})


def prefix_preference(
    provider: Any, *, attention_backend: str = "auto", lm_head_chunk_size: int = 2048
) -> Any:
    """A copy of a Bridge `GPTModelProvider` whose model computes every shared token once.

    `provider` comes from `AutoBridge.to_megatron_provider()` or a recipe's `cfg.model`; hooks,
    such as the one that loads weights, go with it. `attention_backend` is one of
    attention.backends.BACKENDS, or `auto`. Parallel sizes and precision may be set on the result,
    as on any provider. Raises ValueError that names each setting this model does not follow;
    `provide` checks again.
    """
    base = bridge_module("models.gpt_provider").GPTModelProvider
    if not isinstance(provider, base) or type(provider).provide is not base.provide:
        raise ValueError(
            f"provider is a {type(provider).__name__}: only GPTModelProvider, with its own "
            "provide(), can be wrapped. For other models use Bridge's own training"
        )
    refuse(fault_of(provider, "transformer_layer_spec", field_defaults(base)))
    wrapped = copy.copy(provider)
    own_class: Any = type(provider)
    wrapped.__class__ = _prefixed(own_class)
    for hooks in ("_pre_wrap_hooks", "_post_wrap_hooks"):
        if hasattr(wrapped, hooks):
            setattr(wrapped, hooks, list(getattr(wrapped, hooks)))
    for name, value in FORCED.items():
        setattr(wrapped, name, value)
    if wrapped.moe_token_dispatcher_type == "allgather":  # refuses rows of different lengths
        wrapped.moe_token_dispatcher_type = "alltoall"
    wrapped.transformer_layer_spec = prefix_layer_spec
    wrapped.tree_attention_backend = attention_backend
    wrapped.lm_head_chunk_size = lm_head_chunk_size
    refuse(faults(wrapped, prefix_layer_spec))
    return wrapped
