"""config.json of Hugging Face against the sizes of a model, and rotary scaling against theirs."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_prefix.config import ModelConfig, RopeScaling
from megatron_prefix.config.parts import Architecture
from megatron_prefix.errors import InputError
from megatron_prefix.model.hf.config import HFModel
from megatron_prefix.model.hf.export import hf_from_sizes
from megatron_prefix.model.hf.families import FAMILIES
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
WITHOUT_DEFAULT = {"deepseek_v2": {"num_experts_per_tok": 2}, "glm4_moe": {"head_dim": 128}}
"""Keys without a default, or with one that gives 21 rotated channels."""
LAYERS = SIZES["num_hidden_layers"]
FULL, SLIDING = "full_attention", "sliding_attention"
USED = {"use_sliding_window": True}
NO_WINDOW = (None,) * LAYERS


def config(kind: str = "llama", **more) -> dict:
    return {"model_type": kind, **SIZES, **more}


@pytest.fixture
def opened(tmp_path):
    """Write a `config.json` and open its directory."""

    def write(raw: dict) -> HFModel:
        (tmp_path / "config.json").write_text(json.dumps(raw))
        return HFModel.open(str(tmp_path))

    return write


@pytest.fixture
def sizes(opened):
    """The sizes, and the vocabulary's, of a configuration."""

    def read(**raw) -> dict:
        model = opened(config(**raw))
        return {**vars(model.sizes), "vocab_size": model.vocab_size}

    return read


def test_sizes_of_each_architecture(sizes):
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
        "window_size": None,
        "window_attn_skip_freq": None,
        "attn_logit_softcapping": None,
        "softmax_type": "vanilla",
        "architecture": Architecture(),
    }
    for kind, head_dim, bias, norm in (
        ("llama", 16, False, False),
        ("mistral", 16, False, False),
        ("qwen2", 16, True, False),
        ("qwen3", 128, False, True),
    ):
        windowed = {"window_size": (4095, 0)} if kind == "mistral" else {}
        assert sizes(kind=kind, tie_word_embeddings=kind == "qwen2") == {
            **common,
            **windowed,
            "kv_channels": head_dim,
            "add_qkv_bias": bias,
            "qk_layernorm": norm,
            "untie_embeddings_and_output_weights": kind != "qwen2",
        }
    assert sizes(kind="qwen3", head_dim=32)["kv_channels"] == 32
    assert sizes(num_key_value_heads=None)["num_query_groups"] == 4


@pytest.mark.parametrize("kind", FAMILIES)
def test_defaults_are_those_of_transformers(kind, opened):
    """A key that is left out has the value that transformers gives it, whatever that is."""
    epsilon = FAMILIES[kind].epsilon
    given = {epsilon if key == "rms_norm_eps" else key: value for key, value in SIZES.items()}
    if FAMILIES[kind].routing is not None:
        given |= {"num_key_value_heads": given["num_attention_heads"], "num_experts_per_tok": 2}
    full = transformers.AutoConfig.for_model(kind, **given, **MIXTURES.get(kind, {}))
    everything = opened({"model_type": kind, **full.to_dict()}).sizes
    for key in full.to_dict():
        if key in ("model_type", "vocab_size"):
            continue
        default = getattr(transformers.AutoConfig.for_model(kind), key, None)
        if default == getattr(full, key, None):
            raw = {k: x for k, x in full.to_dict().items() if k != key}
            assert opened({"model_type": kind, **raw}).sizes == everything, key
    fewest = opened({"model_type": kind, **WITHOUT_DEFAULT.get(kind, {})})
    theirs = transformers.AutoConfig.for_model(kind)
    assert fewest.sizes.norm_epsilon == getattr(theirs, epsilon)
    assert fewest.vocab_size == theirs.vocab_size


def test_mixtures_differ_in_what_weighs_the_chosen_experts(sizes):
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
        ("mixtral", {"num_local_experts": None}, "num_local_experts"),
        ("mixtral", {"num_experts": 3}, "num_experts and num_local_experts differ"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers = [0]"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 24}, "there are no shared experts"),
        ("qwen3_moe", {"attention_bias": True}, "attention_bias"),
        ("granitemoe", {}, "model_type 'granitemoe'"),
    ],
)
def test_mixtures_that_are_not_supported_are_named(kind, change, named, sizes, tmp_path):
    with pytest.raises(InputError) as caught:
        sizes(kind=kind, **{**MIXTURES.get(kind, {}), **change})
    assert named in str(caught.value) and str(tmp_path) in str(caught.value)


def test_both_spellings_of_rotary_scaling(sizes):
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
def test_scaled_frequencies_are_those_of_transformers(kind, head_dim, base, opened):
    context = 8192
    rope = {"rope_type": kind, "factor": 8.0, "rope_theta": base}
    if kind == "llama3":
        rope |= {**LLAMA3, "original_max_position_embeddings": context}
    theirs_config = transformers.LlamaConfig(
        **{**SIZES, "num_attention_heads": 4, "hidden_size": 4 * head_dim}, rope_parameters=rope
    )
    theirs, factor = ROPE_INIT_FUNCTIONS[kind](theirs_config, "cpu")
    sizes = opened(theirs_config.to_dict()).sizes
    ours = rotary_frequencies(head_dim, sizes.rotary_base, sizes.rope_scaling)
    assert factor == 1.0
    assert torch.allclose(ours, theirs, rtol=5e-7, atol=0)
    plain = rotary_frequencies(head_dim, base)
    assert not torch.allclose(ours, plain, rtol=1e-3, atol=0)
    if kind == "llama3" and head_dim > 16:  # all three ranges were looked at
        ratio = plain / ours
        assert ratio.min() < 1.0001 and ratio.max() > 7.9 and ((ratio > 1.5) & (ratio < 7)).any()


@pytest.mark.parametrize(
    ("kind", "keys", "window"),
    [
        ("llama", {"sliding_window": 7}, NO_WINDOW),
        ("mistral", {}, (4096,) * LAYERS),  # transformers' default
        ("mistral", {"sliding_window": 1000}, (1000,) * LAYERS),
        ("mistral", {"sliding_window": None}, NO_WINDOW),
        ("mixtral", {}, NO_WINDOW),
        ("mixtral", {"sliding_window": 1000}, (1000,) * LAYERS),
        ("qwen2", {"sliding_window": 1000}, NO_WINDOW),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}, (None, None, 4096)),
        ("qwen2", {"use_sliding_window": True}, NO_WINDOW),  # 28 layers before the first window
        ("qwen2", {"use_sliding_window": True, "max_window_layers": LAYERS}, NO_WINDOW),
        ("qwen3", {**USED, "layer_types": [FULL, SLIDING, FULL]}, (None, 4096, None)),
        ("qwen3", {**USED, "layer_types": [SLIDING] * LAYERS}, (4096,) * LAYERS),
        ("qwen3", {**USED, "layer_types": [FULL] * LAYERS}, NO_WINDOW),
        ("qwen3_moe", {"sliding_window": 1000}, NO_WINDOW),
        # every layer of Qwen3-MoE, whatever this says
        ("qwen3_moe", {**USED, "max_window_layers": LAYERS}, (4096,) * LAYERS),
    ],
)
def test_sliding_windows(kind, keys, window, opened):
    sizes = opened(config(kind, **MIXTURES.get(kind, {}), **keys)).sizes
    assert sizes.windows == window and not list(sizes.faults())


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"layer_types": [FULL, SLIDING, FULL]}, "use_sliding_window is false"),
        ({"layer_types": [FULL, "chunked_attention", FULL]}, "chunked_attention"),
        ({"layer_types": [FULL]}, "layer.types"),
        ({"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 0}, "window is 0"),
    ],
)
def test_layers_of_other_kinds_are_refused(keys, named, opened):
    with pytest.raises(InputError, match=named):
        _ = opened(config("qwen3", **keys)).sizes


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
    model = HFModel.read(tmp_path)
    with pytest.raises(InputError, match=f"config.json: .*{key}"):
        _ = (model.kind, model.sizes)


@pytest.mark.parametrize("text", ["[" * 100_000, "5", "", "{" * 9, "\0"])
def test_a_file_that_is_no_configuration(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json: not "):
        HFModel.read(tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 1e299}}, "factor = 1e+299"),
        ({"kind": "gpt2"}, "model_type 'gpt2'"),
        ({"kind": "qwen3_next"}, "state"),
        ({"kind": "mamba2"}, "state"),
        ({"kind": ["llama"]}, "model_type"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": 10**5}, "num_layers = 100000"),
        ({"intermediate_size": 10**400}, "intermediate_size is 1000"),
        ({"rope_theta": 10**400}, "rope_theta is 1000"),
        ({"num_key_value_heads": 3}, "4 query heads over 3"),
        ({"kind": "qwen3_moe", "num_key_value_heads": None}, "num_key_value_heads"),
        ({"head_dim": 3}, "of 3 channels"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"hidden_act": "mish"}, "hidden_act = 'mish'"),
        ({"kind": "qwen3_moe", "attention_bias": True}, "attention_bias"),
        ({"kind": "qwen2", "mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"type": "proportional", "factor": 2.0}}, "'proportional' is not supp"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 0.5}}, "beta_fast = 0.5"),
        ({"kind": "glm", "partial_rotary_factor": 0.29}, "partial_rotary_factor = 0.29"),
        ({"kind": "smollm3", "no_rope_layers": [1, 2, 0]}, "no_rope_layers is [1, 2, 0]"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "mscale": 1.0}}, "parameters.mscale"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"rope_parameters": {FULL: {"rope_type": "default"}}}, FULL),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"layer_types": [FULL] * LAYERS}, "layer_types"),
        ({"kind": "mistral", "layer_types": [FULL] * LAYERS}, "model_type ministral"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
    ],
)
def test_what_is_not_supported_is_named(change, named, sizes, tmp_path):
    with pytest.raises(InputError) as caught:
        sizes(**change)
    assert named in str(caught.value) and str(tmp_path) in str(caught.value)


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
def test_a_model_from_sizes_gets_a_configuration(parts, kind, opened):
    """Back through transformers' own class, it describes the same model."""
    required = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96}
    model = ModelConfig(**required, num_attention_heads=4, rotary_base=2e4, **parts)
    raw = hf_from_sizes(model.sizes(), 258, 512, "float32")
    assert raw["model_type"] == kind and raw["architectures"] == [FAMILIES[kind].architecture]
    assert hasattr(transformers, FAMILIES[kind].architecture)
    full = transformers.AutoConfig.for_model(**raw).to_dict()
    assert full["vocab_size"] == 258 and full["dtype"] == "float32"
    written = replace(model.sizes(), ffn_hidden_size=full["intermediate_size"])
    assert opened(full).sizes == written == opened(raw).sizes
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
