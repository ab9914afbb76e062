"""Which settings of a Bridge provider the model follows; every other one is refused by name."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, fields
from typing import Any

import torch.nn.functional as F
from megatron.core.transformer.enums import AttnBackend

FOLLOWED = frozenset(
    """
    num_layers hidden_size num_attention_heads num_query_groups ffn_hidden_size kv_channels
    layernorm_epsilon add_qkv_bias qk_layernorm softmax_scale vocab_size should_pad_vocab
    make_vocab_size_divisible_by share_embeddings_and_output_weights rotary_base rope_scaling
    rope_scaling_factor seq_len_interpolation_factor
    num_moe_experts moe_ffn_hidden_size moe_router_topk moe_router_pre_softmax moe_grouped_gemm
    moe_permute_fusion
    tensor_model_parallel_size sequence_parallel pipeline_model_parallel_size
    virtual_pipeline_model_parallel_size context_parallel_size expert_model_parallel_size
    expert_tensor_parallel_size num_layers_in_first_pipeline_stage
    num_layers_in_last_pipeline_stage account_for_embedding_in_pipeline_split
    account_for_loss_in_pipeline_split microbatch_group_size_per_vp_stage pipeline_dtype
    tensor_parallel_num_weight_shards expert_tensor_parallel_num_weight_shards
    overlap_p2p_comm batch_p2p_comm batch_p2p_sync deallocate_pipeline_outputs
    bf16 params_dtype autocast_dtype fp8 fp8_recipe fp8_param fp8_margin fp8_interval
    fp8_amax_history_len fp8_amax_compute_algo fp8_wgrad tp_only_amax_red first_last_layers_bf16
    num_layers_at_start_in_bf16 num_layers_at_end_in_bf16
    init_method output_layer_init_method init_method_std embedding_init_method
    embedding_init_method_std perform_initialization use_cpu_initialization use_te_rng_tracker
    inference_rng_tracker
    bias_activation_fusion bias_dropout_fusion persist_layer_norm
    recompute_granularity recompute_method recompute_num_layers recompute_modules
    timers barrier_with_L1_time finalize_model_grads_func grad_scale_func no_sync_func
    grad_sync_func param_sync_func
    """.split()
)
"""Fields that may have any value, because the model or Megatron-Core around it follows them."""

IDLE = frozenset(
    """
    seq_length hf_model_id hf_model_revision attention_softmax_in_fp32 masked_softmax_fusion
    cross_entropy_loss_fusion cross_entropy_fusion_impl cuda_graph_scope cuda_graph_modules
    cuda_graph_warmup_steps cuda_graph_use_single_mempool inference_cuda_graph_scope
    offload_modules
    """.split()
)
"""Fields that may have any value, because they cannot change the result: names, and details of
what tree attention and this loss do not use, or of CUDA graphs and offloading, which are off.
Every field in neither list must have a value of `NEEDED`, or Bridge's default."""

FORCED = {
    "calculate_per_token_loss": True,
    "variable_seq_lengths": True,
    "apply_rope_fusion": False,
    "gradient_accumulation_fusion": False,
}
"""What `prefix_preference` sets, in this order because: a row's loss is already divided by the
step's weight; rows differ in length; the model itself turns heads; the head may project a row in
several chunks."""

NEEDED: dict[str, tuple] = {
    **{name: (value,) for name, value in FORCED.items()},
    "position_embedding_type": ("rope",),
    "normalization": ("RMSNorm",),
    "activation_func": (F.silu, "silu"),
    "gated_linear_unit": (True,),
    "add_bias_linear": (False,),
    "attention_dropout": (0.0,),
    "hidden_dropout": (0.0,),
    "mtp_num_layers": (None, 0),
    "attention_backend": (AttnBackend.auto, "auto", None),
    "moe_router_dtype": (None, "fp32"),
    "moe_token_dispatcher_type": ("alltoall",),
    "moe_router_load_balancing_type": ("aux_loss", "seq_aux_loss", "global_aux_loss", "none"),
}

REMEDY = {
    "attention_backend": "prefix_preference(provider, attention_backend=...) chooses the kernels",
    "cp_comm_type": "preference_data(..., cp_comm=...) chooses how keys travel",
    "moe_aux_loss_coeff": "the load-balancing loss needs token counts that Bridge does not pass",
    "transformer_layer_spec": "tree attention has its own layer spec",
}


def bridge_module(module: str) -> Any:
    try:
        return importlib.import_module(f"megatron.bridge.{module}")
    except ImportError as error:
        raise ImportError(
            f"megatron.bridge.{module} cannot be imported ({error}): install Megatron-Bridge on a "
            "CUDA machine with pip install 'megatron-bridge>=0.6,<0.7'"
        ) from error


def faults(provider: Any, layer_spec: Any) -> Iterator[str]:
    """What a provider asks for that the model does not do, one message per field. `layer_spec` is
    the `transformer_layer_spec` that it must have."""
    defaults = field_defaults(bridge_module("models.gpt_provider").GPTModelProvider)
    defaults["transformer_layer_spec"] = layer_spec
    for field in fields(provider):
        name = field.name
        is_idle = name.startswith("moe_") and provider.num_moe_experts is None
        if name in FOLLOWED or name in IDLE or name[0] == "_":
            continue
        if is_idle and name != "moe_token_dispatcher_type":
            continue
        yield from fault_of(provider, name, defaults)
    factor = provider.seq_len_interpolation_factor
    if provider.__dict__["rope_scaling"] and factor is not None:
        yield (
            f"model.rope_scaling = True with model.seq_len_interpolation_factor = {factor}: the "
            "model scales rotary positions in one way; set one of them back to its default"
        )


def fault_of(provider: Any, name: str, defaults: dict[str, Any]) -> Iterator[str]:
    """The message about one field, if there is one."""
    value = getattr(provider, name)
    if name not in NEEDED and name not in defaults:
        yield f"model.{name}: GPTModelProvider has no such field, and the model does not follow it"
        return
    allowed = NEEDED.get(name) or (defaults[name],)
    if not any(value is x or value == x for x in allowed):
        why = REMEDY.get(name, "prefix-sharing models do not follow this setting")
        yield f"model.{name} = {value!r}: {why}; set it to {allowed[0]!r}"


def refuse(messages: Iterable[str]) -> None:
    """Raise ValueError with all messages, if there are any."""
    if faults := list(messages):
        raise ValueError("\n".join(faults))


def field_defaults(dataclass: type) -> dict[str, Any]:
    """The default of every field; None for a field without one."""
    return {
        f.name: f.default_factory()
        if f.default_factory is not MISSING
        else (None if f.default is MISSING else f.default)
        for f in fields(dataclass)
    }
