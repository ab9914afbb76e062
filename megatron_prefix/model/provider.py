"""Build the part of a model that one pipeline stage or virtual chunk holds, and load it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.activations import quick_gelu
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_prefix.attention import check_backend
from megatron_prefix.config import ModelConfig, ModelSizes, ParallelConfig
from megatron_prefix.config.lora import FEED_FORWARD_TARGETS, LoraConfig, lora_size_faults
from megatron_prefix.errors import InputError
from megatron_prefix.kernels import why_no_kernels
from megatron_prefix.model.adapters import freeze_base, start_saved_modules
from megatron_prefix.model.gpt import TreeGPTModel, TreeTransformerConfig
from megatron_prefix.model.heads import TreeRewardModel
from megatron_prefix.model.hf import HFModel, WeightMap
from megatron_prefix.model.init import initialize_adapters, initialize_weights
from megatron_prefix.model.names import EMBEDDING, OUTPUT_LAYER, REWARD_HEAD
from megatron_prefix.model.overlap import overlap_settings
from megatron_prefix.model.parameters import base_parameters, tensor_group
from megatron_prefix.model.precision import fp8_settings
from megatron_prefix.model.spec import uses_transformer_engine
from megatron_prefix.model.vision import VisionSettings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ACTIVATIONS: dict[str, Callable] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "relu": F.relu,
}
_FIXED: dict[str, Any] = dict(
    attention_dropout=0.0,
    hidden_dropout=0.0,
    perform_initialization=False,
    # Sums over pairs are divided by the plan's normaliser, never by micro batches or ranks.
    calculate_per_token_loss=True,
    masked_softmax_fusion=False,
    persist_layer_norm=False,
    bias_dropout_fusion=False,
    apply_rope_fusion=False,
    moe_token_dispatcher_type="alltoall",  # needed for variable lengths, also without experts
)
"""Settings of Megatron-Core that are the same for every model."""


def transformer_config(
    model: ModelConfig,
    *,
    vocab_size: int | None = None,
    seed: int | None,
    head_seed: int | None = None,
    parallel: ParallelConfig | None = None,
    sizes: ModelSizes | None = None,
    lora: LoraConfig | None = None,
    adapter_seed: int | None = None,
    source: HFModel | None = None,
    reads_images: bool = True,
) -> TreeTransformerConfig:
    """Megatron-Core's configuration of `model`, for CUDA if there is a device, else for CPU.

    Sizes and vocabulary that are not given are read from the directory or Hub id `model.hf`, and
    whether it has a vision part, which is frozen unless the data `reads_images`. `source` is that
    directory, or one of a checkpoint, if it is open.
    `seed` draws the initial weights; None leaves them undefined, for weights that are loaded next,
    except a reward model's head, which `head_seed` draws. With `lora` the model is frozen, except
    for adapters, which `adapter_seed` draws. Raises InputError if the layout does not divide the
    model, or if the attention backend cannot run here.
    """
    parallel = parallel or ParallelConfig()
    if source is None and model.hf is not None and (sizes is None or vocab_size is None):
        source = HFModel.open(model.hf)
    sizes, vocab_size = _resolved(model, sizes, vocab_size, source)
    parallel.check_model(model, sizes)
    if lora is not None:
        if faults := list(lora_size_faults(lora, sizes, model.kind)):
            raise InputError("; ".join(faults))
        lora = lora.resolved(sizes.num_moe_experts > 0, sizes.num_layers)
    on_cuda = torch.cuda.is_available()
    parts = sizes.architecture
    is_swiglu = parts.activation == "silu" and parts.gated_linear_unit and not parts.linear_offset
    # see swiglu.py
    own_gate = is_swiglu and not (uses_transformer_engine(parts) or sizes.num_moe_experts)
    dtype = DTYPES[model.dtype]
    config = TreeTransformerConfig(
        **_size_settings(sizes),
        **_FIXED,
        init_method_std=model.init_method_std,
        use_cpu_initialization=not on_cuda,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        gradient_accumulation_fusion=_fuses_accumulation(parallel),
        bias_activation_fusion=on_cuda and is_swiglu and not own_gate,
        use_te_activation_func=own_gate,
        **fp8_settings(model, parts),
        **_layout_settings(parallel),
        **overlap_settings(parallel, parts),
        **_expert_settings(model, sizes, parallel, lora),
        recompute_granularity=model.recompute_granularity,
        recompute_method=model.recompute_method,
        recompute_num_layers=model.recompute_num_layers,
        vocab_size=vocab_size,
        make_vocab_size_divisible_by=model.make_vocab_size_divisible_by,
        kind=model.kind,
        num_labels=model.num_labels,
        share_embeddings_and_output_weights=model.kind == "lm"
        and not sizes.untie_embeddings_and_output_weights,
        tree_attention_backend=model.attention_backend,
        lm_head_chunk_size=model.lm_head_chunk_size,
        kernels=_kernels(model, on_cuda, own_gate),
        init_seed=seed,
        head_seed=head_seed if model.kind == "reward" else None,
        lora=lora,
        adapter_seed=adapter_seed,
        vision=_vision_settings(model, source, lora is not None, reads_images),
    )
    try:
        check_backend(config, torch.device("cuda" if on_cuda else "cpu"))
    except ValueError as error:
        raise InputError(f"model.{error}") from None
    return config


def _vision_settings(
    model: ModelConfig, source: HFModel | None, has_adapters: bool, reads_images: bool
) -> VisionSettings | None:
    if source is None or source.images is None:
        return None
    given = model.vision
    return VisionSettings(
        directory=source.directory,
        trains_tower=reads_images and given is not None and not given.freeze_tower,
        trains_projector=reads_images
        and (not has_adapters if given is None else given.trains_projector(has_adapters)),
    )


def _kernels(model: ModelConfig, on_cuda: bool, own_gate: bool) -> tuple[str, ...]:
    """The Triton kernels that `model` asks for. Raises InputError if they cannot run here."""
    for key in model.kernels:
        if obstacle := why_no_kernels("cuda" if on_cuda else "cpu"):
            raise InputError(f"model.{key} = True: {obstacle}")
    if model.bias_swiglu_fusion and not own_gate:
        raise InputError(
            "model.bias_swiglu_fusion = True has no effect: the feed-forward layers of this model "
            "have experts, another activation than SwiGLU, or are Transformer Engine's, which "
            "fuses it by itself: leave it out"
        )
    return tuple(model.kernels.values())


def _fuses_accumulation(parallel: ParallelConfig) -> bool:
    """Whether products of matrices add to sums of gradients. Raises InputError if they cannot."""
    if not parallel.gradient_accumulation_fusion:
        return False
    if importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is None:
        raise InputError(
            "parallel.gradient_accumulation_fusion = True: fused_weight_gradient_mlp_cuda is not "
            "installed: install APEX with --cpp_ext and --cuda_ext, or leave it out"
        )
    return True


def _resolved(
    model: ModelConfig, sizes: ModelSizes | None, vocab_size: int | None, source: HFModel | None
) -> tuple[ModelSizes, int]:
    """Sizes and vocabulary as given, else those of `model`, else those of `source`."""
    sizes = sizes or model.sizes()
    if source is not None:
        sizes, vocab_size = sizes or source.sizes, vocab_size or source.vocab_size
    if sizes is None or vocab_size is None:
        missing = "model.num_layers" if sizes is None else "vocab_size"
        raise InputError(
            f"{missing} is missing: give the model's sizes and vocabulary, or model.hf"
        )
    return sizes, vocab_size


def _size_settings(sizes: ModelSizes) -> dict[str, Any]:
    parts = sizes.architecture
    return dict(
        num_layers=sizes.num_layers,
        hidden_size=sizes.hidden_size,
        ffn_hidden_size=sizes.ffn_hidden_size,
        num_attention_heads=sizes.num_attention_heads,
        num_query_groups=sizes.num_query_groups,
        kv_channels=sizes.kv_channels,
        layernorm_epsilon=sizes.norm_epsilon,
        add_qkv_bias=sizes.add_qkv_bias,
        qk_layernorm=sizes.qk_layernorm,
        window_size=sizes.window_size,
        window_attn_skip_freq=list(sizes.window_attn_skip_freq or ()) or None,
        softmax_type=sizes.softmax_type,
        attn_logit_softcapping=sizes.attn_logit_softcapping,
        rotary_base=sizes.rotary_base,
        rope_scaling=sizes.rope_scaling,
        architecture=parts,
        normalization="RMSNorm" if parts.normalization == "rms" else "LayerNorm",
        layernorm_zero_centered_gamma=parts.norm_adds_one,
        gated_linear_unit=parts.gated_linear_unit,
        activation_func=ACTIVATIONS[parts.activation],
        activation_func_clamp_value=parts.gate_limit,
        glu_linear_offset=parts.linear_offset,
        add_bias_linear=(parts.output_bias and parts.latent is None)
        or parts.mlp_bias
        or parts.expert_bias,
        softmax_scale=parts.softmax_scale,
    )


def _layout_settings(parallel: ParallelConfig) -> dict[str, Any]:
    is_interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    return dict(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        num_layers_in_first_pipeline_stage=parallel.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=parallel.num_layers_in_last_pipeline_stage,
        context_parallel_size=parallel.context_parallel_size,
        # Rows of a step differ in length; stages know them (engine/pipeline.py).
        variable_seq_lengths=parallel.pipeline_model_parallel_size > 1,
        # With batched sends, interleaved stages on gloo silently get wrong gradients.
        batch_p2p_comm=not is_interleaved,
        overlap_p2p_comm=is_interleaved,
    )


def _expert_settings(
    model: ModelConfig, sizes: ModelSizes, parallel: ParallelConfig, lora: LoraConfig | None
) -> dict[str, Any]:
    has_experts = sizes.num_moe_experts > 0
    # Adapters of experts need one module for each expert.
    adapts_experts = lora is not None and {*FEED_FORWARD_TARGETS} & {*(lora.target_modules or ())}
    return dict(
        num_moe_experts=sizes.num_moe_experts if has_experts else None,
        moe_ffn_hidden_size=sizes.moe_ffn_hidden_size if has_experts else None,
        moe_shared_expert_intermediate_size=sizes.architecture.shared_expert_size or None,
        moe_shared_expert_gate=sizes.architecture.shared_expert_gate,
        moe_layer_freq=[int(sizes.has_experts(layer)) for layer in range(sizes.num_layers)]
        if sizes.architecture.dense_layers
        else 1,
        moe_router_topk=sizes.moe_router_topk,
        moe_router_pre_softmax=sizes.moe_router_pre_softmax,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",  # our router has its own; see model/layers/moe.py
        moe_aux_loss_coeff=model.moe_aux_loss_coeff,
        moe_count=model.moe_count,
        moe_grouped_gemm=has_experts
        and uses_transformer_engine(sizes.architecture)
        and not adapts_experts,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
    )


def model_provider(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    *,
    config: TreeTransformerConfig,
    pg_collection: ProcessGroupCollection,
) -> TreeGPTModel:
    """Build one stage's model, with initial weights if `config.init_seed` is set.

    Megatron-LM and Megatron-Bridge call their providers with these arguments.
    """
    model = (TreeRewardModel if config.kind == "reward" else TreeGPTModel)(
        config,
        pre_process=pre_process,
        post_process=post_process,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )
    if config.init_seed is not None:
        initialize_weights(model, config.init_seed)
    elif config.head_seed is not None:
        initialize_weights(model, config.head_seed, only=REWARD_HEAD)
    if config.lora is not None:
        if config.adapter_seed is not None:
            initialize_adapters(model, config.adapter_seed)
        start_saved_modules(model)
        freeze_base(model)
    return model


@torch.no_grad()
def load_hf_weights(
    model: TreeGPTModel,
    directory: str | Path,
    sizes: ModelSizes | None = None,
    keeps_head: bool = False,
) -> None:
    """Fill this rank's part of the model from safetensors, one tensor at a time.

    Reads only the rows and columns that the tensor-parallel rank owns, and casts them to the
    model's precision. `sizes` are those that the model was made with, by default those of the
    directory's `config.json`; with `keeps_head` a reward model keeps its own head, for a directory
    without one. Adapters stay as they are. Raises InputError.
    """
    directory = Path(directory)
    source, config = HFModel.read(directory), model.config
    weights = WeightMap.of(source, sizes=sizes, kind=config.kind, num_labels=config.num_labels)
    sizes, tensors = weights.sizes, weights.tensors(directory)
    shapes = weights.hf_shapes()
    if keeps_head:
        del shapes[REWARD_HEAD]
    tensors.match(shapes, is_tied=not sizes.untie_embeddings_and_output_weights)
    padded = model.config.padded_vocab_size
    tied = model.config.share_embeddings_and_output_weights
    for name, parameter in base_parameters(model):
        if tied and name == OUTPUT_LAYER:  # the last pipeline stage's copy
            name = EMBEDDING
        if keeps_head and name == REWARD_HEAD:
            continue
        group = tensor_group(name, model)
        tensor = weights.read(name, tensors.read, group.rank(), group.size(), padded)
        assert tensor.shape == parameter.shape, f"{name}: {tensor.shape}, not {parameter.shape}"
        parameter.copy_(tensor)
