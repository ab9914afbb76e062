"""config.json of reward models: how they are recognised, and which token pads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_prefix.model.hf.config import HFModel
from megatron_prefix.model.hf.export import reward_config

LM = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "eos_token_id": 2}


def kind_of(folder: Path, config: dict) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    return HFModel.read(folder).kind


def test_kinds(tmp_path):
    one = {"model_type": "qwen2", "architectures": ["Qwen2ForSequenceClassification"]}
    assert kind_of(tmp_path, {**one, "id2label": {"0": "LABEL_0"}}) == "reward"
    assert kind_of(tmp_path, {**one, "id2label": None, "num_labels": 1}) == "reward"
    assert kind_of(tmp_path, LM) == "lm" and kind_of(tmp_path, {}) == "lm"


def test_a_classifier_with_several_labels(tmp_path):
    two = {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}
    assert kind_of(tmp_path, two) == "reward"
    config = reward_config({**LM, "hidden_size": 64, "pad_token_id": 5}, tmp_path, 3)
    assert config["num_labels"] == 3 and config["id2label"]["2"] == "LABEL_2"
    assert kind_of(tmp_path, config) == "reward"


def test_the_result_is_a_reward_models(tmp_path):
    config = reward_config({**LM, "hidden_size": 64, "pad_token_id": 5}, tmp_path)
    assert kind_of(tmp_path, config) == "reward" and config["hidden_size"] == 64
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["num_labels"] == 1 and config["pad_token_id"] == 5


@pytest.mark.parametrize(
    "tokenizer_config, tokenizer, pad",
    [
        (None, None, None),
        ({"pad_token": None}, None, None),
        ({"pad_token": "<pad>"}, None, None),
        ({"pad_token": "<pad>"}, {"added_tokens": [{"id": 7, "content": "<pad>"}]}, 7),
        ({"pad_token": {"content": "<pad>"}}, {"model": {"vocab": {"<pad>": 4}}}, 4),
        ({"pad_token": "</s>"}, {"model": {"vocab": {"</s>": 2}}}, None),
    ],
    ids=["no tokenizer", "null", "no ids", "added", "vocabulary", "end of text"],
)
def test_the_tokenizers_padding(tokenizer_config, tokenizer, pad, tmp_path):
    for name, value in (("tokenizer_config", tokenizer_config), ("tokenizer", tokenizer)):
        if value is not None:
            (tmp_path / f"{name}.json").write_text(json.dumps(value))
    assert reward_config(LM, tmp_path)["pad_token_id"] == pad


@pytest.mark.parametrize("ends", [5, [2, 5]])
def test_padding_that_ends_texts_is_not_kept(ends, tmp_path):
    """transformers would score the token before the end."""
    config = reward_config({**LM, "pad_token_id": 5, "eos_token_id": ends}, tmp_path)
    assert config["pad_token_id"] is None


def test_a_reward_models_own_labels_stay(tmp_path):
    one = {"model_type": "qwen3", "id2label": {"0": "good"}}
    one["architectures"] = ["Qwen3ForSequenceClassification"]
    config = reward_config({**one, "pad_token_id": 2, "eos_token_id": 2}, tmp_path)
    assert config == {**one, "pad_token_id": None, "eos_token_id": 2}
