"""Switches for fused kernels: the same run with stand-ins, refusals by name."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from megatron.core.tensor_parallel import layers
from small_runs import configure, timeless, trained

from megatron_prefix.config import ModelConfig, ParallelConfig, parse_config
from megatron_prefix.errors import InputError
from megatron_prefix.model import transformer_config
from megatron_prefix.testing import write_random_set

SIZES = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4}


class Accumulation:
    """APEX's extension for CPU, and the number of its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def wgrad_gemm_accum_fp32(self, inputs, grad_outputs, main_grad) -> None:
        self.calls += 1
        main_grad.add_(grad_outputs.flatten(0, -2).T @ inputs.flatten(0, -2))


@pytest.fixture
def apex(monkeypatch) -> Accumulation:
    own, find = Accumulation(), importlib.util.find_spec
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", own, raising=False)
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    name = "fused_weight_gradient_mlp_cuda"
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda x, *rest: own if x == name else find(x, *rest)
    )
    return own


@pytest.mark.parametrize("model", [{}, {"lm_head_chunk_size": 8}], ids=["", "chunked head"])
def test_gradients_added_inside_of_their_products_change_nothing(tmp_path, apex, model):
    data = write_random_set(tmp_path / "set", 6, 16)
    sections = {"data": {"row_capacity": 200}, "train": {"steps": 2}, "model": model}
    runs = []
    for fuses in (False, True):
        parallel = {"gradient_accumulation_fusion": fuses}
        config = configure(tmp_path / f"{fuses}", data, **sections, parallel=parallel)
        runs.append(timeless(trained(config)))
    assert apex.calls > 20
    assert runs[0] == runs[1]


def test_without_apex_the_switch_is_refused():
    parallel = ParallelConfig(gradient_accumulation_fusion=True)
    with pytest.raises(InputError, match="gradient_accumulation_fusion = True.*install APEX"):
        transformer_config(ModelConfig(**SIZES), vocab_size=64, seed=1, parallel=parallel)


@pytest.mark.parametrize(
    "key", ["apply_rope_fusion", "bias_swiglu_fusion", "cross_entropy_loss_fusion"]
)
def test_kernels_are_refused_without_cuda(key):
    model = ModelConfig(**SIZES, **{key: True})
    with pytest.raises(InputError, match=f"model.{key} = True: Triton kernels run on CUDA"):
        transformer_config(model, vocab_size=64, seed=1)


def test_the_gates_kernel_is_refused_with_experts(monkeypatch):
    monkeypatch.setattr("megatron_prefix.model.provider.why_no_kernels", lambda device: None)
    model = ModelConfig(**SIZES, num_moe_experts=2, bias_swiglu_fusion=True)
    with pytest.raises(InputError, match="bias_swiglu_fusion = True has no effect"):
        transformer_config(model, vocab_size=64, seed=1)


def test_the_kernel_of_sums_is_refused_if_auto_chooses_a_backend_without_copies(monkeypatch):
    monkeypatch.setattr("megatron_prefix.model.provider.why_no_kernels", lambda device: None)
    model = ModelConfig(**SIZES, key_sum_fusion=True)
    message = "model.key_sum_fusion = True has no effect with attention_backend: auto, which.*path"
    with pytest.raises(InputError, match=message):
        transformer_config(model, vocab_size=64, seed=1)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"kind": "reward", "cross_entropy_loss_fusion": True}, "kind: reward has none"),
        ({"attention_backend": "path", "key_sum_fusion": True}, "path, which copies no keys"),
    ],
)
def test_switches_without_effect_are_refused(model, message):
    raw = {"data": {"train": "x", "row_capacity": 8, "global_batch_size": 1}}
    raw |= {"model": SIZES | model, "optimizer": {"lr": 1.0}, "train": {"steps": 1}}
    with pytest.raises(InputError, match=message):
        parse_config(raw | {"logging": {"output": "y"}})
