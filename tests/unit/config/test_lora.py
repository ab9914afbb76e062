"""The lora section: PEFT's names, what is refused and why, and its round trip."""

from __future__ import annotations

import copy

import pytest
import yaml
from test_config import GOOD

from megatron_prefix.config import ModelSizes, parse_config
from megatron_prefix.config.lora import TARGETS, LoraConfig, lora_size_faults
from megatron_prefix.errors import InputError


def parse(lora: object, **model: object):
    raw = copy.deepcopy(GOOD)
    raw["model"] |= model
    return parse_config({**raw, "lora": lora})


def sizes(**given) -> ModelSizes:
    base = {"num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 2}
    return ModelSizes(**{**base, "num_query_groups": 2, "kv_channels": 4, **given})


def test_defaults_are_those_of_peft():
    lora = parse({}).lora.resolved(has_experts=False)
    assert (lora.r, lora.lora_alpha, lora.scale) == (8, 8.0, 1.0)
    assert lora.target_modules == TARGETS and lora.layers_to_transform is None
    assert parse({"r": 16, "lora_alpha": 32, "use_rslora": True}).lora.scale == 8.0


def test_all_linear_of_a_mixture_leaves_its_experts_out():
    lora = parse({"target_modules": "all-linear"}).lora.resolved(has_experts=True)
    assert lora.target_modules == ("q_proj", "k_proj", "v_proj", "o_proj")
    named = parse({"target_modules": ["down_proj", "gate_proj"]}).lora.resolved(has_experts=True)
    assert named.target_modules == ("gate_proj", "down_proj")


def test_without_the_section_there_are_no_adapters():
    config = parse_config(GOOD)
    assert config.lora is None and "lora" not in yaml.safe_load(config.to_yaml())


def test_the_section_survives_a_round_trip():
    given = {"r": 4, "lora_alpha": 8.0, "target_modules": ["q_proj"], "layers_to_transform": [0]}
    given |= {"adapter": "somewhere", "reference": "start", "modules_to_save": ["lm_head"]}
    config = parse(given)
    again = yaml.safe_load(config.to_yaml())
    assert again["lora"] == {**given, "lora_dropout": 0.0}
    assert parse_config(again) == config


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"lora_dropout": 0.05}, "lora.lora_dropout = 0.05: .*sharing would change what is"),
        ({"use_dora": True}, "unknown key lora.use_dora"),
        ({"bias": "none"}, "unknown key lora.bias"),
        ({"rank_pattern": {}}, "unknown key lora.rank_pattern"),
        ({"r": 0}, "lora.r = 0"),
        ({"lora_alpha": 0}, "lora.lora_alpha = 0"),
        ({"target_modules": []}, "lora.target_modules"),
        ({"target_modules": ["q_proj", "q_proj"]}, "none twice"),
        ({"target_modules": ["lm_head"]}, "lora.target_modules"),
        ({"layers_to_transform": [2]}, "the model has layers 0 to 1"),
        ({"reference": "base"}, "without lora.adapter"),
        ({"reference": "start"}, "without lora.adapter"),
        ({"modules_to_save": ["score"]}, "lora.modules_to_save"),
    ],
)
def test_what_cannot_be_is_refused_by_name(lora, message):
    with pytest.raises(InputError, match=message):
        parse(lora, num_layers=2)


def test_tied_embeddings_and_reward_models_have_no_whole_copies():
    tied = sizes(untie_embeddings_and_output_weights=False)
    (fault,) = lora_size_faults(LoraConfig(modules_to_save=("embed_tokens",)), tied, "lm")
    assert "one matrix" in fault
    with pytest.raises(InputError, match="reward head instead; that is always trained"):
        raw = copy.deepcopy(GOOD)
        raw["model"] |= {"kind": "reward"}
        parse_config({**raw, "loss": {}, "lora": {"modules_to_save": ["lm_head"]}})
    with pytest.raises(InputError, match="which has no reference"):
        parse_config({**raw, "loss": {}, "lora": {"adapter": "x", "reference": "base"}})
