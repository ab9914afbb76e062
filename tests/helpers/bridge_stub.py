"""Megatron-Bridge 0.6.2 on CPU: the classes and calls that megatron_prefix.bridge meets.

Signatures, fields and defaults are Bridge's own; test_bridge.py compares them with its source.
Bodies are short versions of what Bridge does there. Unused parameters stay, as they are part of
the signatures.
"""

from __future__ import annotations

import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.models.common.embeddings import yarn_rotary_pos_embedding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.rerun_state_machine import RerunDataIterator, get_rerun_state_machine
from megatron.core.transformer import ModuleSpec, attention
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig as MCoreTransformerConfig
from megatron.core.utils import get_model_config

fusions = SimpleNamespace(can_enable_gradient_accumulation_fusion=lambda: False)


def default_layer_spec(config: GPTModelProvider) -> ModuleSpec:
    return get_gpt_layer_local_spec(normalization=config.normalization)


@dataclass
class TransformerConfig(MCoreTransformerConfig):
    """Core's, whose checks wait for `finalize`."""

    def __post_init__(self) -> None:
        pass

    def finalize(self) -> None:
        MCoreTransformerConfig.__post_init__(self)


class ModelProviderMixin(ABC):
    @abstractmethod
    def provide(
        self,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ): ...

    def provide_distributed_model(
        self,
        ddp_config=None,
        model_type=ModelType.encoder_or_decoder,
        overlap_param_gather_with_optimizer_step: bool = False,
        fp16: bool | None = None,
        bf16: bool | None = None,
        use_megatron_fsdp: bool = False,
        use_torch_fsdp2: bool = False,
        wrap_with_ddp: bool = True,
        data_parallel_random_init: bool = False,
        use_cpu_initialization: None | bool = False,
        init_model_with_meta_device: bool | None = None,
        pre_wrap_hook=None,
        post_wrap_hook=None,
        mixed_precision_wrapper=Float16Module,
        pg_collection=None,
    ) -> list:
        self._pg_collection = pg_collection
        model = [self.provide(pre_process=True, post_process=True)]
        for hook in pre_wrap_hook or getattr(self, "_pre_wrap_hooks", []):
            model = hook(model) or model
        if wrap_with_ddp:
            model = [DistributedDataParallel(self, ddp_config, chunk) for chunk in model]
        return model

    def register_pre_wrap_hook(self, hook: Callable, prepend: bool = False) -> None:
        if not hasattr(self, "_pre_wrap_hooks"):
            self._pre_wrap_hooks = []
        self._pre_wrap_hooks.insert(0 if prepend else len(self._pre_wrap_hooks), hook)


@dataclass
class GPTModelProvider(TransformerConfig, ModelProviderMixin):
    fp16_lm_cross_entropy: bool = False
    parallel_output: bool = True
    share_embeddings_and_output_weights: bool = True
    make_vocab_size_divisible_by: int = 128
    position_embedding_type: Literal["learned_absolute", "rope", "yarn"] = "learned_absolute"
    rotary_base: int = 10000
    rotary_percent: float = 1.0
    rope_scaling: bool = False
    rope_scaling_factor: float = 1.0
    rotary_scaling_factor: float | None = None
    seq_len_interpolation_factor: float | None = None
    yarn_rotary_scaling_factor: float | None = None
    yarn_original_max_position_embeddings: int | None = None
    yarn_beta_fast: float | None = None
    yarn_beta_slow: float | None = None
    yarn_mscale: float | None = None
    yarn_mscale_all_dim: float | None = None
    yarn_correction_range_round_to_int: bool | None = None
    seq_length: int = 1024
    attention_softmax_in_fp32: bool = False
    deallocate_pipeline_outputs: bool = True
    scatter_embedding_sequence_parallel: bool = True
    tp_only_amax_red: bool = False
    tp_comm_overlap_cfg: str | dict[str, Any] | None = None
    use_transformer_engine_full_layer_spec: bool = False
    use_transformer_engine_op_fuser: bool = False
    dense_grouped_gemm: bool = False
    transformer_layer_spec: ModuleSpec | Callable[[GPTModelProvider], ModuleSpec] = (
        default_layer_spec
    )
    hf_model_id: str | None = None
    hf_model_revision: str | None = None
    vocab_size: int | None = None
    should_pad_vocab: bool = False
    num_moe_experts: int | None = None
    moe_grouped_gemm: bool = False
    qk_layernorm: bool = False
    fp8: str | None = None
    normalization: str = "LayerNorm"
    mtp_enabled: bool = False
    init_model_with_meta_device: bool = False
    use_te_rng_tracker: bool = False
    virtual_pipeline_model_parallel_size: int | None = None
    account_for_embedding_in_pipeline_split: bool = False
    account_for_loss_in_pipeline_split: bool = False
    masked_softmax_fusion: bool = True
    cross_entropy_loss_fusion: bool = True
    gradient_accumulation_fusion: bool = field(
        default_factory=fusions.can_enable_gradient_accumulation_fusion
    )
    restore_modelopt_state: bool = False
    use_arbitrary_attention_mask: bool | None = None
    _pg_collection: Any | None = None

    def provide(self, pre_process=None, post_process=None, vp_stage=None):
        raise AssertionError("Bridge's own model was built")


@dataclass(kw_only=True)
class DataloaderConfig:
    dataloader_type: Literal["single", "cyclic", "batch", "external"] | None = None
    num_workers: int = 2
    data_sharding: bool = True
    pin_memory: bool = True
    drop_last: bool = True
    persistent_workers: bool = True
    trust_remote_code: bool | None = None
    dataloader_save: str | None = None
    dataloader_load: str | None = None

    def finalize(self) -> None:
        if self.num_workers == 0 and self.persistent_workers:
            self.persistent_workers = False


@dataclass(frozen=True)
class DatasetBuildContext:
    train_samples: int
    valid_samples: int
    test_samples: int
    tokenizer: Any | None = None
    pg_collection: Any | None = None


@dataclass
class DatasetProvider(DataloaderConfig, ABC):
    @abstractmethod
    def build_datasets(self, context: DatasetBuildContext) -> tuple: ...


def install(monkeypatch) -> None:
    """Put the stub where `import megatron.bridge...` looks, for the length of a test."""
    parts = {
        "models": {},
        "models.gpt_provider": {"GPTModelProvider": GPTModelProvider},
        "data": {},
        "data.base": {"DatasetProvider": DatasetProvider},
    }
    monkeypatch.setitem(sys.modules, "megatron.bridge", ModuleType("megatron.bridge"))
    for name, content in parts.items():
        module = ModuleType(f"megatron.bridge.{name}")
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    # Bridge does so when it is imported: Megatron-Core takes a field that is None for YaRN's.
    for place in (yarn_rotary_pos_embedding, attention):
        name = "_yarn_get_concentration_factor_from_config"
        monkeypatch.setattr(place, name, lambda config: 1.0, raising=False)


def prepare_forward_step_func(forward_step_func, state):
    """training/utils/train_utils.py: inject the state, found by the first parameter's name."""
    names = list(inspect.signature(forward_step_func).parameters)
    return partial(forward_step_func, state) if names[0] == "state" else forward_step_func


def data_iterator_of(dataset, groups) -> RerunDataIterator:
    """data/loaders.py with dataloader_type "external": the provider's iterator, passed through."""
    assert isinstance(dataset, DatasetProvider) and dataset.dataloader_type == "external"
    train, _, _ = dataset.build_datasets(DatasetBuildContext(0, 0, 0, pg_collection=groups))
    return RerunDataIterator(train)


def update_model_config_funcs(model_config, optimizer, pg_collection) -> None:
    """training/setup.py, `_update_model_config_funcs`."""
    model_config.finalize_model_grads_func = partial(
        finalize_model_grads, pg_collection=pg_collection
    )
    model_config.grad_scale_func = optimizer.scale_loss


def train_step(
    forward_step_func,
    data_iterator,
    model,
    optimizer,
    scheduler,
    global_state,
    pg_collection,
    forward_backward_func,
    p2p_communicator,
) -> tuple[dict[str, float], float]:
    """training/train.py: one step. Returns the reduced losses and the gradient norm."""
    model_config = get_model_config(model[0])
    rerun_state_machine = get_rerun_state_machine()
    while rerun_state_machine.should_run_forward_backward(data_iterator):
        for model_chunk in model:
            model_chunk.zero_grad_buffer()
        optimizer.zero_grad()
        seq_length = model_config.seq_length
        losses_reduced = forward_backward_func(
            forward_step_func=forward_step_func,
            data_iterator=data_iterator,
            model=model,
            num_microbatches=get_num_microbatches(),
            seq_length=seq_length,
            micro_batch_size=global_state.cfg.train.micro_batch_size,
            decoder_seq_length=seq_length,
            forward_only=False,
            adjust_tensor_shapes_fn=None,
            p2p_communicator=p2p_communicator,
            pg_collection=pg_collection,
        )
    _, grad_norm, _ = optimizer.step()
    reduced = {}
    for key in losses_reduced[0]:
        value = [x[key].view(-1) for x in losses_reduced]
        assert value[0].numel() == 2, f"Bridge averages {key} over micro batches, not over pairs"
        value = torch.vstack(value).sum(dim=0)
        torch.distributed.all_reduce(value, group=pg_collection.dp_cp)
        reduced[key] = float(value[0] / value[1])
    global_state.train_state.step += 1
    return reduced, grad_norm
