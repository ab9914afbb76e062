"""config.json of Hugging Face against the sizes of a model, and rotary scaling against theirs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_prefix.config import ModelConfig, RopeScaling
from megatron_prefix.errors import InputError
from megatron_prefix.model.hf.config import ARCHITECTURES, HFModel, sizes_from_hf
from megatron_prefix.model.hf.export import hf_from_sizes
from megatron_prefix.model.layers.rope import rotary_frequencies

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
}


MIXTURES = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        "head_dim": 16,
    },
}


def config(kind: str = "llama", **more) -> dict:
    return {"model_type": kind, **SIZES, **more}


def sizes(**raw) -> dict:
    """The sizes, and the vocabulary's, of a configuration."""
    model = HFModel(Path("here"), config(**raw))
    return {**vars(model.sizes), "vocab_size": model.vocab_size}


def sliding_window(raw: dict) -> int | None:
    return HFModel(Path("here"), raw).sliding_window


def test_sizes_of_each_architecture():
    common = {
        "num_layers": 3,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "norm_epsilon": 1e-6,
        "rotary_base": 10000.0,
        "vocab_size": 300,
        "rope_scaling": None,
        "num_moe_experts": 0,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 0,
        "moe_router_pre_softmax": False,
    }
    for kind, head_dim, bias, norm in (
        ("llama", 16, False, False),
        ("mistral", 16, False, False),
        ("qwen2", 16, True, False),
        ("qwen3", 128, False, True),
    ):
        assert sizes(kind=kind, tie_word_embeddings=kind == "qwen2") == {
            **common,
            "kv_channels": head_dim,
            "add_qkv_bias": bias,
            "qk_layernorm": norm,
            "untie_embeddings_and_output_weights": kind != "qwen2",
        }
    assert sizes(kind="qwen3", head_dim=32)["kv_channels"] == 32
    assert sizes(num_key_value_heads=None)["num_query_groups"] == 4


def test_what_transformers_fills_in_is_what_is_taken():
    """For a key that is not given, transformers' default and ours must be the same."""
    for kind in ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe"):
        parts = MIXTURES.get(kind, {})
        raw = config(kind, **parts)
        full = transformers.AutoConfig.for_model(**raw).to_dict()
        assert sizes_from_hf(raw, "raw") == sizes_from_hf(full, "full"), kind


def test_mixtures_differ_in_what_weighs_the_chosen_experts():
    mixtral = sizes(kind="mixtral", **MIXTURES["mixtral"])
    experts = {"num_moe_experts": 4, "moe_router_topk": 2}
    assert {**mixtral, **experts, "moe_ffn_hidden_size": 96} == mixtral
    assert not mixtral["moe_router_pre_softmax"] and not mixtral["qk_layernorm"]
    for normed in (False, True):
        qwen = sizes(kind="qwen3_moe", **MIXTURES["qwen3_moe"], norm_topk_prob=normed)
        assert {**qwen, **experts, "moe_ffn_hidden_size": 24, "qk_layernorm": True} == qwen
        assert qwen["moe_router_pre_softmax"] is not normed


@pytest.mark.parametrize(
    ("kind", "change", "named"),
    [
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1"),
        ("mixtral", {"capacity_factor": 1.25}, "capacity_factor = 1.25"),
        ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok is 5, above"),
        ("mixtral", {"num_local_experts": None}, "num_local_experts is None"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers = [0]"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 24}, "there are no shared experts"),
        ("qwen3_moe", {"attention_bias": True}, "attention_bias"),
        ("qwen2_moe", {}, "model_type 'qwen2_moe'"),
    ],
)
def test_mixtures_that_are_not_supported_are_named(kind, change, named):
    with pytest.raises(InputError) as caught:
        sizes(kind=kind, **{**MIXTURES.get(kind, {}), **change})
    assert named in str(caught.value) and "here" in str(caught.value)


def test_both_spellings_of_rotary_scaling():
    old = sizes(rope_theta=5e5, rope_scaling={**LLAMA3, "type": "llama3"})
    new = sizes(rope_parameters={**LLAMA3, "rope_theta": 5e5})
    assert old == new and new["rotary_base"] == 5e5
    values = {k: LLAMA3[k] for k in list(LLAMA3)[1:]}
    assert new["rope_scaling"] == RopeScaling(type="llama3", **values)
    linear = sizes(rope_scaling={"type": "linear", "factor": 4.0})
    assert linear["rope_scaling"] == RopeScaling(type="linear", factor=4.0)
    assert sizes(rope_scaling=None)["rope_scaling"] is None


@pytest.mark.parametrize("base", [10000.0, 500000.0])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_scaled_frequencies_are_those_of_transformers(kind, head_dim, base):
    context = 8192
    rope = {"rope_type": kind, "factor": 8.0, "rope_theta": base}
    if kind == "llama3":
        rope |= {**LLAMA3, "original_max_position_embeddings": context}
    theirs_config = transformers.LlamaConfig(
        **{**SIZES, "num_attention_heads": 4, "hidden_size": 4 * head_dim}, rope_parameters=rope
    )
    theirs, factor = ROPE_INIT_FUNCTIONS[kind](theirs_config, "cpu")
    sizes = sizes_from_hf(theirs_config.to_dict(), "here")
    ours = rotary_frequencies(head_dim, sizes.rotary_base, sizes.rope_scaling)
    assert factor == 1.0
    assert torch.allclose(ours, theirs, rtol=5e-7, atol=0)
    plain = rotary_frequencies(head_dim, base)
    assert not torch.allclose(ours, plain, rtol=1e-3, atol=0)
    if kind == "llama3" and head_dim > 16:  # all three ranges were looked at
        ratio = plain / ours
        assert ratio.min() < 1.0001 and ratio.max() > 7.9 and ((ratio > 1.5) & (ratio < 7)).any()


def test_sliding_windows():
    assert sliding_window(config("mistral", sliding_window=4096)) == 4096
    assert sliding_window(config("mistral", sliding_window=None)) is None
    qwen = {"sliding_window": 1000, "use_sliding_window": True, "max_window_layers": 2}
    assert sliding_window(config("qwen2", **qwen)) == 1000
    assert sliding_window(config("qwen2", **{**qwen, "use_sliding_window": False})) is None
    assert sliding_window(config("qwen2", **{**qwen, "max_window_layers": 3})) is None
    assert sliding_window(config("llama", sliding_window=7)) is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architectures", 5),
        ("architectures", "LlamaForSequenceClassification"),
        ("layer_types", 3),
        ("max_window_layers", "2"),
        ("num_hidden_layers", [2]),
    ],
)
def test_a_key_of_another_type_is_named(tmp_path, key, value):
    (tmp_path / "config.json").write_text(json.dumps(config("qwen2", **{key: value})))
    with pytest.raises(InputError, match=f"config.json: {key} is "):
        HFModel.read(tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, "5", "", "{" * 9, "\0"])
def test_a_file_that_is_no_configuration(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json: not "):
        HFModel.read(tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 1e299}}, "factor = 1e+299"),
        ({"kind": "gemma"}, "model_type 'gemma'"),
        ({"kind": ["llama"]}, "model_type"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": 10**5}, "num_layers = 100000"),
        ({"intermediate_size": 10**400}, "intermediate_size is 1000"),
        ({"rope_theta": 10**400}, "rope_theta is 1000"),
        ({"num_key_value_heads": 3}, "4 query heads over 3"),
        ({"kind": "mistral", "num_key_value_heads": None}, "num_key_value_heads is None"),
        ({"head_dim": 15}, "of 15 channels"),
        ({"rms_norm_eps": None}, "rms_norm_eps is None"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "'yarn' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "factor is None"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_what_is_not_supported_is_named(change, named):
    with pytest.raises(InputError) as caught:
        sizes(**change)
    assert named in str(caught.value) and "here" in str(caught.value)


@pytest.mark.parametrize(
    ("parts", "kind"),
    [
        ({}, "llama"),
        ({"add_qkv_bias": True}, "qwen2"),
        ({"qk_layernorm": True, "kv_channels": 32}, "qwen3"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "llama"),
        ({"untie_embeddings_and_output_weights": False}, "llama"),
        ({"num_moe_experts": 4}, "mixtral"),
        ({"num_moe_experts": 4, "moe_ffn_hidden_size": 24, "qk_layernorm": True}, "qwen3_moe"),
        (
            {"num_moe_experts": 4, "moe_router_pre_softmax": True, "qk_layernorm": True},
            "qwen3_moe",
        ),
    ],
)
def test_a_model_from_sizes_gets_a_configuration(parts, kind):
    """Back through transformers' own class, it describes the same model."""
    required = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96}
    model = ModelConfig(**required, num_attention_heads=4, rotary_base=2e4, **parts)
    raw = hf_from_sizes(model.sizes(), 258, 512, "float32")
    assert raw["model_type"] == kind and raw["architectures"] == [ARCHITECTURES[kind]]
    assert hasattr(transformers, ARCHITECTURES[kind])
    full = transformers.AutoConfig.for_model(**raw).to_dict()
    assert full["vocab_size"] == 258 and full["dtype"] == "float32"
    assert sizes_from_hf(full, "here") == replace(
        model.sizes(), ffn_hidden_size=full["intermediate_size"]
    )
    assert full["intermediate_size"] == 96 or kind == "mixtral"


def test_a_model_without_an_architecture_is_refused():
    model = ModelConfig(
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=4,
        add_qkv_bias=True,
        qk_layernorm=True,
    )
    with pytest.raises(InputError, match="both model.add_qkv_bias and model.qk_layernorm"):
        hf_from_sizes(model.sizes(), 258, 512, "float32")
    for parts in ({"add_qkv_bias": True}, {"add_qkv_bias": False, "moe_router_pre_softmax": True}):
        mixture = replace(model, qk_layernorm=False, num_moe_experts=4, **parts)
        with pytest.raises(InputError, match="model.num_moe_experts with"):
            hf_from_sizes(mixture.sizes(), 258, 512, "float32")
