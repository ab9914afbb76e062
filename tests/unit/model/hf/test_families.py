"""The keys that a family knows are all that its class in transformers reads."""

from __future__ import annotations

import importlib
import inspect
import re

import pytest
import transformers

from megatron_prefix.model.hf.families import FAMILIES
from megatron_prefix.model.hf.keys import NO_EFFECT, ONLY, READ

ATTRIBUTE = re.compile(r"\bconfig\.([a-z_]\w*)|getattr\((?:self\.)?config, \"(\w+)\"")
OF_IMAGES = {
    "gemma3_text": {"vision_config", "text_config", "image_token_id", "mm_tokens_per_image"}
}
"""Keys that classes in the same file read, for models of images and text."""
METHODS = {"get_text_config", "to_dict"}


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_the_models_code_reads_is_known(kind):
    """A newer transformers whose code reads another key fails here, before it is used."""
    folder = kind.removesuffix("_text")
    code = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    reads = {x or y for x, y in ATTRIBUTE.findall(inspect.getsource(code))}
    assert len(reads) > 10 and reads - FAMILIES[kind].known - METHODS == OF_IMAGES.get(kind, set())


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_key_of_the_class_is_known(kind):
    config = transformers.AutoConfig.for_model(kind).to_dict()
    assert set(config) - FAMILIES[kind].known - {"per_layer_config"} == set()


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_architecture_is_the_class_that_transformers_chooses(kind):
    cls = transformers.AutoConfig.for_model(kind).__class__
    chosen = transformers.AutoModelForCausalLM._model_mapping[cls]
    assert chosen.__name__ == FAMILIES[kind].architecture
    classifiers = transformers.AutoModelForSequenceClassification._model_mapping
    classifier = classifiers[cls].__name__ if cls in classifiers.keys() else None  # noqa: SIM118
    assert classifier == FAMILIES[kind].classifier


def test_no_key_is_in_two_lists():
    assert not (READ & NO_EFFECT or READ & ONLY.keys() or NO_EFFECT & ONLY.keys())
    for family in FAMILIES.values():
        assert not family.own & family.no_effect and not family.only.keys() & family.no_effect
        assert family.experts is None or family.experts in family.read
    assert "attention_bias" in FAMILIES["qwen3"].own
    assert "attention_bias" in FAMILIES["qwen3_moe"].only
    assert "attention_bias" not in FAMILIES["qwen2"].only


def test_names_of_linear_layers():
    llama = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert tuple(FAMILIES["gemma2"].linears.values()) == llama
    phi = FAMILIES["phi3"].linears
    assert phi["query"] == phi["value"] == "qkv_proj" and phi["gate"] == "gate_up_proj"
    assert FAMILIES["mixtral"].linears["up"] == "w3"
    starcoder = FAMILIES["starcoder2"].linears
    assert (starcoder["up"], starcoder["down"]) == ("c_fc", "c_proj") and "gate" not in starcoder
