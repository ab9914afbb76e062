"""Multi-latent attention besides its values: what is counted, kept in float32, or refused."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from family_models import make_family
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from safetensors.torch import load_file, save_file
from test_family_parity import build

from megatron_prefix.config import ModelConfig, ParallelConfig
from megatron_prefix.config.lora import LATENT_TARGETS, LoraConfig
from megatron_prefix.data.steps import CostModel
from megatron_prefix.errors import InputError
from megatron_prefix.estimate.adapters import rank_adapters
from megatron_prefix.estimate.memory import layer_activations, rank_parameters
from megatron_prefix.model.hf import HFModel
from megatron_prefix.model.hf.families import FAMILIES
from megatron_prefix.model.names import ADAPTERS
from megatron_prefix.model.provider import model_provider, transformer_config
from megatron_prefix.testing import write_random_set

EXPERTS, CHOSEN = 8, 3


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return write_random_set(tmp_path / "set", 0, 2)


def test_parameters_and_operations_are_those_of_the_model_that_is_built(prefix, tmp_path, world):
    make_family("deepseek v3", tmp_path / "hf")
    config = ModelConfig(hf=str(tmp_path / "hf"), make_vocab_size_divisible_by=1)
    sizes = HFModel.read(tmp_path / "hf").sizes
    model = build(tmp_path / "hf", prefix, world, make_vocab_size_divisible_by=1)
    named = dict(model.named_parameters())
    dense, experts = rank_parameters(config, sizes, ParallelConfig(), 270, 0)
    assert dense + experts == sum(x.numel() for x in named.values())
    assert experts == sum(x.numel() for name, x in named.items() if ".experts." in name)
    # a token runs through every matrix of the layers once, and through 3 of 8 experts
    passes = {
        name: CHOSEN / EXPERTS if ".experts." in name else 1.0
        for name, x in named.items()
        if x.dim() == 2 and "embedding" not in name and "output_layer" not in name
    }
    weights = sum(share * named[name].numel() for name, share in passes.items())
    cost = CostModel.of_model(sizes, 270)
    assert cost.per_token == 2 * weights
    assert cost.per_entry == 3 * 6 * 2 * (18 + 12)  # layers, heads, channels of a query and a value
    halves = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
    whole = sum(x.numel() for name, x in named.items() if "down_proj" in name and "kv" in name)
    whole += sum(x.numel() for name, x in named.items() if "q_down_proj" in name)
    small, half_experts = rank_parameters(config, sizes, halves, 270, 0)
    others = sum(x.numel() for name, x in named.items() if x.dim() == 1 or "router" in name)
    assert half_experts == experts // 2
    assert small == (dense - whole - others) // 2 + whole + others
    # 4 C + 4 N H + N V + 2 x 28 + 2 x 20 + 8, and the mean of one dense layer and two of experts
    feed_forward = (3 * 80 + 2 * (CHOSEN * (2 * 48 + 3 * 24) + 3 * 24)) / 3
    values = 4 * 48 + 4 * 6 * 18 + 6 * 12 + 2 * 28 + 2 * 20 + 8 + feed_forward
    assert layer_activations(config, sizes, ParallelConfig(), 1) == round(values * 4 + 4 * 6)


def test_its_parts_have_the_names_of_megatron_cores_layer(prefix, tmp_path, world):
    """And so have checkpoints."""
    theirs = {field.name for field in fields(MLASelfAttentionSubmodules)}
    for family in ("deepseek v3", "deepseek v2, dense"):
        make_family(family, tmp_path / family)
        model = build(tmp_path / family, prefix, world)
        own = {name for name, _ in model.decoder.layers[0].self_attention.named_children()}
        assert own <= theirs and len(own) > 4


def test_the_correction_stays_in_float32_and_is_not_trained(prefix, tmp_path, world):
    make_family("deepseek v3", tmp_path / "hf")
    model = build(tmp_path / "hf", prefix, world)
    stored = {}
    for file in sorted((tmp_path / "hf").glob("*.safetensors")):
        stored |= load_file(file)
    model.bfloat16()
    for layer in (1, 2):
        bias = model.decoder.layers[layer].mlp.router.expert_bias
        expected = stored[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"]
        assert bias.dtype == torch.float32 and torch.equal(bias, expected)
        assert not bias.requires_grad
    assert model.decoder.layers[1].mlp.router.weight.dtype == torch.bfloat16


def test_layers_that_predict_further_tokens_are_refused_by_name(prefix, tmp_path, world):
    make_family("deepseek v3", tmp_path / "hf")
    first = min((tmp_path / "hf").glob("*.safetensors"))
    tensors = load_file(first)
    tensors["model.layers.3.enorm.weight"] = torch.ones(48)
    save_file(tensors, first, {"format": "pt"})
    index = tmp_path / "hf" / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"]["model.layers.3.enorm.weight"] = first.name
    index.write_text(json.dumps(table))
    with pytest.raises(InputError, match=r"layers\.3\.enorm.*num_nextn_predict_layers.*save_pre"):
        build(tmp_path / "hf", prefix, world)


@pytest.mark.parametrize(
    ("family", "targets", "message"),
    [
        (
            "deepseek v3",
            None,
            "all-linear: a model with multi.*of q_proj, k_proj.*of q_a_proj",
        ),
        ("deepseek v2, dense", ("q_a_proj",), "no adapters of q_a_proj: name some of q_proj, kv_a"),
        ("glm moe", ("kv_b_proj",), "without multi-latent attention has no adapters of kv_b_proj"),
        ("deepseek v3", ("o_proj", "up_proj"), "with multi-latent .* has no adapters of up_proj"),
        ("glm moe", ("o_proj", "up_proj"), "first 1 layers of the model have no experts"),
    ],
)
def test_adapters_that_are_not_supported_are_refused(family, targets, message, tmp_path, world):
    make_family(family, tmp_path / "hf")
    config = ModelConfig(hf=str(tmp_path / "hf"))
    with pytest.raises(InputError, match=message):
        transformer_config(config, seed=0, lora=LoraConfig(target_modules=targets))


def test_parameters_of_adapters_are_those_that_are_built(tmp_path, world):
    make_family("deepseek v3", tmp_path / "hf")
    config = ModelConfig(hf=str(tmp_path / "hf"))
    lora = LoraConfig(r=4, target_modules=(*LATENT_TARGETS, "o_proj"))
    built = transformer_config(config, seed=0, lora=lora, adapter_seed=0)
    model = model_provider(config=built, pg_collection=world.groups)
    added = {name: x.numel() for name, x in model.named_parameters() if x.requires_grad}
    assert all(ADAPTERS in name for name in added) and len(added) == 3 * 5 * 2
    sizes = HFModel.read(tmp_path / "hf").sizes
    lora = lora.resolved(has_experts=True)
    assert rank_adapters(config, sizes, ParallelConfig(), lora, 270, 0) == (sum(added.values()), 0)
    halves = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
    # both factors of what compresses are whole, and A of columns and B of rows
    whole = 3 * 4 * ((48 + 28) + (48 + 20 + 8) + 28 + 20 + 48)
    assert rank_adapters(config, sizes, halves, lora, 270, 0) == (
        whole + (sum(added.values()) - whole) // 2,
        0,
    )


def test_names_of_its_linear_layers():
    own = FAMILIES["deepseek_v3"].linears
    assert list(own.values())[:5] == [
        "q_proj",
        "q_a_proj",
        "q_b_proj",
        "kv_a_proj_with_mqa",
        "kv_b_proj",
    ]
