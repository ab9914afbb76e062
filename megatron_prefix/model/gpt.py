"""Megatron-Core's GPT over packed prefix trees.

Two steps of the stock model are replaced. Rotary angles come from
`packed_seq_params.position_ids`, because siblings have the same positions; they are computed once
for all layers, and attention rotates queries and keys by them. After the layers only the tokens
that predict a response token are projected, and the model returns token log-probabilities.

Shapes: T tokens, C hidden channels, U tokens that are projected, N targets.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.models.common.embeddings.language_model_embedding import (
    LanguageModelEmbedding,
)
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.quantization.utils import get_quant_config_or_none
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_prefix.attention import Rotation, TreePackedSeqParams, rotation_of
from megatron_prefix.config import RopeScaling
from megatron_prefix.config.fp8 import ROWS
from megatron_prefix.config.lora import LoraConfig
from megatron_prefix.config.parts import Architecture
from megatron_prefix.model.layers import rotary_angles
from megatron_prefix.model.logps import token_logps
from megatron_prefix.model.spec import tree_block_spec
from megatron_prefix.model.vision import RowPixels, VisionPart, VisionSettings

PARTITION_DIMS = {
    "word_embeddings.weight": 0,
    "output_layer.weight": 0,
    "lm_head.weight": 0,
    "linear_qkv.weight": 0,
    "linear_qkv.bias": 0,
    "linear_fc1.weight": 0,
    "linear_fc1.bias": 0,
    "linear_q_proj.weight": 0,
    "linear_q_up_proj.weight": 0,
    "linear_kv_up_proj.weight": 0,
    "linear_proj.weight": 1,
    "linear_fc2.weight": 1,
}
"""The dimension of each parameter that tensor parallelism divides."""


@dataclass
class TreeTransformerConfig(TransformerConfig):
    """Megatron-Core's TransformerConfig, with settings of the whole model besides its layers'."""

    kind: str = "lm"
    """`lm` or `reward`, as config.ModelConfig has it."""
    num_labels: int = 1
    """Scores that a reward model gives each response."""
    vocab_size: int = 0
    """Tokens of the tokenizer's vocabulary; the embedding may be padded beyond them."""
    make_vocab_size_divisible_by: int = 64
    """The padded vocabulary is a multiple of this times the tensor parallel size."""
    share_embeddings_and_output_weights: bool = False
    rotary_base: float = 10000.0
    rope_scaling: RopeScaling | None = None
    attn_logit_softcapping: float | None = None
    """Bound c of attention scores s, which become c tanh(s / c)."""
    architecture: Architecture = Architecture()
    tree_attention_backend: str = "auto"
    """One of attention.backends.BACKENDS, or `auto`."""
    lm_head_chunk_size: int = 2048
    """Tokens projected to logits at a time."""
    kernels: tuple[str, ...] = ()
    """What Triton kernels compute in place of elementary operations: `rotary`, `gate` (of
    feed-forward layers), `head` (log-softmax) and `key_sums` (gradients of copied keys)."""
    row_tokens: int = 0
    """Tokens of every row on this rank, before sequence parallelism; 0: rows differ."""
    moe_count: str = "tokens"
    """How often the router's auxiliary loss counts a token: once (`tokens`), or once per response
    that it belongs to (`responses`)."""
    init_seed: int | None = None
    """Seed of the initial weights, drawn by parameter name; None draws none."""
    head_seed: int | None = None
    """Seed of a reward model's head, if its other weights are loaded."""
    lora: LoraConfig | None = None
    """Adapters, with every setting resolved; None trains all weights."""
    vision: VisionSettings | None = None
    """What reads images; None: the model reads none."""
    adapter_seed: int | None = None
    """Seed of the adapters, drawn by parameter name; None draws none."""

    def __post_init__(self) -> None:
        """Megatron-Core's checks. It refuses biases of divided experts, because it would add them
        once per tensor-parallel rank, which `ExpertOutput` (layers/moe.py) does not."""
        has_biases = getattr(self, "add_bias_linear")  # noqa: B009
        if self.num_moe_experts is not None and self.tensor_model_parallel_size > 1:
            self.add_bias_linear = False
        super().__post_init__()
        self.add_bias_linear = has_biases

    @property
    def token_multiple(self) -> int:
        """A rank's tokens of a row are a multiple of this: 1, except in FP8."""
        return ROWS[self.fp8_recipe] if self.fp8 else 1

    @property
    def padded_vocab_size(self) -> int:
        multiple = self.make_vocab_size_divisible_by * self.tensor_model_parallel_size
        return -(-self.vocab_size // multiple) * multiple


class TreeGPTModel(LanguageModule):
    """GPT whose attention, positions and head follow `TreePackedSeqParams`.

    Its parts, their names and so its checkpoints are those of Megatron-Core's `GPTModel`, which
    0.19 deprecates: embedding, decoder (the block of layers), output_layer.
    """

    config: TreeTransformerConfig
    has_adapters_on: bool = True
    """Whether trained copies of `lora.modules_to_save` replace their originals."""

    def __init__(
        self,
        config: TreeTransformerConfig,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.share_embeddings_and_output_weights = config.share_embeddings_and_output_weights
        self.model_type = ModelType.encoder_or_decoder  # read by the pipeline schedules
        if pre_process:
            self.embedding = self._make_embedding()
            if config.vision is not None:
                device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
                self.vision = VisionPart(config.vision, config.params_dtype, torch.device(device))
        self.decoder = TransformerBlock(
            config=config,
            spec=tree_block_spec(config, config.tree_attention_backend, vp_stage=vp_stage),
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=self.pg_collection,
            vp_stage=vp_stage,
        )
        if post_process:
            self._add_head()
        saved = config.lora.modules_to_save if config.lora is not None else None
        if saved:
            self.saved_modules = torch.nn.ModuleDict()
            if pre_process and "embed_tokens" in saved:
                self.saved_modules["embed_tokens"] = self._make_embedding()
            if post_process and "lm_head" in saved:
                self.saved_modules["lm_head"] = self._make_output_layer()
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()
        for name, module in self.named_modules():
            if hasattr(module, "finish_init"):  # Transformer Engine's layers
                module.finish_init(get_quant_config_or_none(name, config.quant_recipe))
        self._mark_partitions()

    def _make_embedding(self) -> LanguageModelEmbedding:
        return LanguageModelEmbedding(
            config=self.config,
            vocab_size=self.config.padded_vocab_size,
            max_sequence_length=0,
            position_embedding_type="none",
            # Features of images replace embeddings of the whole row, before ranks divide it.
            scatter_to_sequence_parallel=self.config.vision is None,
            tp_group=self.pg_collection.tp,
        )

    def _add_head(self) -> None:
        self.output_layer = self._make_output_layer()

    def _make_output_layer(self) -> ColumnParallelLinear:
        """The projection to logits. A shared weight is passed to it in the forward pass."""
        config = self.config
        layer = ColumnParallelLinear(
            config.hidden_size,
            config.padded_vocab_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            skip_bias_add=False,
            gather_output=False,
            skip_weight_param_allocation=self.pre_process
            and self.share_embeddings_and_output_weights,
            tp_group=self.pg_collection.tp,
        )
        # Its input is selected from the whole sequence, which is gathered before it.
        layer.sequence_parallel = False
        layer.allreduce_dgrad = self.pg_collection.tp.size() > 1
        return layer

    def _used(self, name: str, original: torch.nn.Module) -> torch.nn.Module:
        """The trained copy of `lora.modules_to_save`, or the original if there is none or adapters
        are off."""
        saved = getattr(self, "saved_modules", {})
        return saved[name] if self.has_adapters_on and name in saved else original

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Give the stage its input, the hidden states of the stage before. Called by the
        pipeline schedules."""
        if isinstance(input_tensor, list):
            (input_tensor,) = input_tensor
        self.decoder.set_input_tensor(input_tensor)

    def _mark_partitions(self) -> None:
        """Mark the parameters that are slices, with the dimension that is divided.

        Megatron-Core marks them while it draws weights, but here init.py draws them. Without the
        mark, gradient norms take a slice for a duplicate and leave it out.
        """
        for name, parameter in self.named_parameters():
            kind = ".".join(name.split(".")[-2:]).rstrip("0123456789")  # grouped: weight0, …
            if kind in PARTITION_DIMS and not getattr(parameter, "tensor_model_parallel", False):
                set_tensor_model_parallel_attributes(parameter, True, PARTITION_DIMS[kind], 1)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        packed_seq_params: TreePackedSeqParams | None = None,
        images: RowPixels | None = None,
    ) -> Tensor:
        """Token ids [1, T] -> the output of `_head` for every target, float32 [N], or, before
        the last pipeline stage, hidden states [T, 1, C].

        Positions, mask and targets come from `packed_seq_params`; `position_ids`,
        `attention_mask` and `labels` are None, as the arguments of Megatron-LM's loops are. The
        features of `images` replace the embeddings of their placeholders.
        """
        if not isinstance(packed_seq_params, TreePackedSeqParams):
            raise ValueError(
                "TreeGPTModel trains and scores rows of prefix trees: call it with "
                "packed_seq_params=TreePackedSeqParams(…)"
            )
        for name, value in (("attention_mask", attention_mask), ("labels", labels)):
            if value is not None:
                raise ValueError(f"{name} must be None: it comes from packed_seq_params")
        if decoder_input is None and self.pre_process:
            embedding = self._used("embed_tokens", self.embedding)
            decoder_input = embedding(input_ids=input_ids, position_ids=position_ids)
            multiplier = self.config.architecture.embedding_multiplier
            if multiplier != 1:  # rounded like the embedding, as in transformers
                decoder_input = decoder_input * decoder_input.new_full((), multiplier)
            decoder_input = self._with_images(decoder_input, images)
            if self.config.lora is not None and torch.is_grad_enabled():
                decoder_input = self._with_gradient(decoder_input)
        hidden_states = self.decoder(
            hidden_states=decoder_input,
            attention_mask=None,
            packed_seq_params=replace(packed_seq_params, **self._rotations(packed_seq_params)),
        )
        if not self.post_process:
            return hidden_states
        if self.config.sequence_parallel:
            # Every rank computes the same targets, so gradients must not be summed again.
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        assert packed_seq_params.logit_tokens is not None
        hidden_UC = hidden_states.squeeze(1).index_select(0, packed_seq_params.logit_tokens)
        return self._head(hidden_UC, packed_seq_params)

    def _with_images(self, hidden_T1C: Tensor, images: RowPixels | None) -> Tensor:
        """The embeddings with features of images in the place of their placeholders. With sequence
        parallelism, this rank's part of them."""
        if self.config.vision is None:
            if images is not None:
                raise ValueError("the row has images and the model reads none: give a vision model")
            return hidden_T1C
        if images is not None and len(images.places):
            if not images.batches:
                raise ValueError(
                    "the row has images and no pixels: call to_device with pictures=Pictures.of(…)"
                )
            features_KC = self.vision(images).index_select(0, images.sources).to(hidden_T1C.dtype)
            hidden_T1C = hidden_T1C.index_copy(0, images.places, features_KC[:, None])
        elif torch.is_grad_enabled() and self.vision.is_trained:
            hidden_T1C = hidden_T1C + self.vision.nothing().to(hidden_T1C.dtype)
        if self.config.sequence_parallel:
            hidden_T1C = scatter_to_sequence_parallel_region(
                hidden_T1C, group=self.pg_collection.tp
            )
        return hidden_T1C

    def _with_gradient(self, decoder_input: Tensor) -> Tensor:
        """The output of a frozen embedding, with a gradient: a recomputed layer has a backward pass
        only if its input has one, and so has a pipeline stage before the first adapter."""
        return decoder_input.requires_grad_()

    def _rotations(self, params: TreePackedSeqParams) -> dict[str, Any]:
        """The rotations of every position along its root path, once for all layers."""
        config, parts = self.config, self.config.architecture
        position_ids = params.position_ids
        assert position_ids is not None

        def rotation(base: float, scaling: RopeScaling | None) -> Rotation:
            channels = parts.rotary_channels or config.kv_channels
            positions = position_ids if params.axes is None else params.axes
            sections = parts.rotary_sections
            angles = rotary_angles(positions, channels, base, scaling, sections)
            amplitude = 1.0 if scaling is None else scaling.amplitude
            result = rotation_of(angles, amplitude, parts.rotary_interleaved)
            result = result._replace(is_fused="rotary" in config.kernels)
            if config.bf16:
                result = result._replace(cos=result.cos.bfloat16(), sin=result.sin.bfloat16())
            if (growth := parts.query_growth) is not None:
                assert parts.query_growth_length is not None
                result = result.with_growth(position_ids, growth, parts.query_growth_length)
            return result

        rotations = {"rotation": rotation(config.rotary_base, config.rope_scaling)}
        if parts.local_rotary_base is not None:
            local = rotation(parts.local_rotary_base, parts.local_rope_scaling)
            rotations["local_rotation"] = local
        return rotations

    def _head(self, hidden_UC: Tensor, params: TreePackedSeqParams) -> Tensor:
        """Log-probability of every target, float32 [N]; [lines, N] with collisions or scales; or
        the logits of every token that predicts, float32 [U, vocabulary]."""
        assert params.logit_of_target is not None and params.target_tokens is not None
        weight = None
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
        output_layer = self._used("lm_head", self.output_layer)
        if params.with_logits:
            return self._whole_logits(self._logits(output_layer, hidden_UC, weight))
        return token_logps(
            hidden_UC,
            lambda chunk: self._logits(output_layer, chunk, weight),
            params.logit_of_target,
            params.target_tokens,
            offsets=params.target_offsets,
            vocab_size=self.config.vocab_size,
            chunk_size=self.config.lm_head_chunk_size,
            group=self.pg_collection.tp,
            with_collisions=params.with_collisions,
            scale_layers=self.config.num_layers if params.with_scales else None,
            is_fused="head" in self.config.kernels,
        )

    def _whole_logits(self, logits: Tensor) -> Tensor:
        """The logits of all tensor-parallel ranks side by side, without padding of the vocabulary.
        Without gradient."""
        group = self.pg_collection.tp
        parts = [torch.empty_like(logits) for _ in range(group.size())]
        torch.distributed.all_gather(parts, logits.contiguous(), group=group)
        return torch.cat(parts, dim=-1)[:, : self.config.vocab_size].float()

    def _logits(self, output_layer: Any, hidden_UC: Tensor, weight: Tensor | None) -> Tensor:
        """This rank's logits, [U, vocabulary / tensor-parallel ranks]."""
        logits = output_layer(hidden_UC.unsqueeze(1), weight=weight)[0].squeeze(1)
        parts = self.config.architecture
        if parts.logits_multiplier != 1:
            logits = logits * parts.logits_multiplier
        if (cap := parts.final_logit_softcapping) is not None:
            logits = cap * torch.tanh(logits / cap)
        return logits

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict:
        """As `GPTModel` has it: the projection's weight and no other state of it."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        state.pop(f"{prefix}output_layer._extra_state", None)
        return state


def unwrap(model: torch.nn.Module) -> TreeGPTModel:
    """The model inside Megatron-Core's wrappers for mixed precision and data parallelism."""
    while not isinstance(model, TreeGPTModel):
        inner = model.module
        assert isinstance(inner, torch.nn.Module)
        model = inner
    return model
