"""config.json: unknown keys, code, adapters, and what transformers refuses."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
import transformers

from megatron_prefix.config import RopeScaling
from megatron_prefix.errors import InputError
from megatron_prefix.model.hf.config import HFModel
from megatron_prefix.model.hf.files import HFTensors
from megatron_prefix.model.hf.weights import WeightMap

ROOT = Path(__file__).resolve().parents[4]
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 300,
}
LINEAR = {"rope_type": "linear", "factor": 4.0}


def write(folder: Path, **changes) -> HFModel:
    (folder / "config.json").write_text(json.dumps(LLAMA | changes))
    return HFModel.open(str(folder))


def refusal(folder: Path, **changes) -> str:
    with pytest.raises(InputError) as caught:
        _ = write(folder, **changes).sizes
    assert str(folder) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"logit_scale": 0.5},
        {"text_config": {"hidden_size": 32}},
        {"per_layer_config": {"1": {"intermediate_size": 48}}},
        {"configuration_files": ["config.5.0.0.json"]},
        {"transformers_weights": "other.safetensors"},
        {"norm_topk_prob": True},
        {"attn_logit_softcapping": 50.0},
        {"use_sliding_window": False},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_key_that_is_not_known_is_refused_by_name(changes, tmp_path):
    message = refusal(tmp_path, **changes)
    assert f"{next(iter(changes))} = " in message and "remove it from config.json" in message


def test_null_and_keys_without_effect_change_nothing(tmp_path):
    plain = write(tmp_path).sizes
    without = {
        **{"logit_scale": None, "sliding_window": 3, "pretraining_tp": 4, "use_cache": False},
        **{"torch_dtype": "float16", "temperature": 0.6, "attention_dropout": 0.5},
        **{"bos_token_id": 7, "_name_or_path": "me/model", "initializer_range": 0.5},
        **{"_model_name_or_path": "a title"},
        "auto_map": {"AutoTokenizer": "tokenization.Own"},
    }
    assert write(tmp_path, **without).sizes == plain


def test_a_model_with_its_own_code_is_refused(tmp_path):
    (tmp_path / "modeling.py").write_text("raise SystemExit('this must never run')")
    for kind in ("llama", "own"):
        auto_map = {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"}
        message = refusal(tmp_path, model_type=kind, auto_map=auto_map)
        assert "auto_map.AutoConfig" in message and "code of a model is never run" in message
    assert "auto_map" in refusal(tmp_path, auto_map="modeling.Model")


def test_what_transformers_refuses_is_refused_with_its_words(tmp_path):
    message = refusal(tmp_path, rope_parameters={"rope_type": "linear"})
    assert "transformers 5" in message and "factor" in message


def test_what_one_key_does_to_another_is_left_to_transformers(tmp_path):
    """Qwen's model cards tell users to add rope_scaling to a file that has rope_parameters."""
    base = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    added = write(tmp_path, **base, rope_scaling=LINEAR)
    assert added.sizes.rope_scaling.factor == 4.0
    assert added.sizes.rotary_base == added.settings.rope_parameters["rope_theta"]
    yarn = {"rope_type": "yarn", "factor": 4.0}
    scaling = write(tmp_path, **base, rope_scaling=yarn).sizes.rope_scaling
    assert scaling == RopeScaling(type="yarn", factor=4.0, original_max_position_embeddings=2048)


@pytest.mark.parametrize(
    "outside, inside, used", [(16, 64, 16), (None, 64, 64), (None, None, 2048)]
)
def test_the_original_context_is_the_one_that_transformers_uses(outside, inside, used, tmp_path):
    """2048 is Llama's default of max_position_embeddings."""
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if inside:
        rope["original_max_position_embeddings"] = inside
    more = {} if outside is None else {"original_max_position_embeddings": outside}
    scaling = write(tmp_path, rope_parameters=rope, **more).sizes.rope_scaling
    assert scaling.original_max_position_embeddings == used


TEXT = {**LLAMA, "model_type": "ministral3", "num_key_value_heads": 2, "pad_token_id": None}
PIXTRAL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}


def test_a_text_model_inside_another_model_is_read_when_it_is_saved_by_itself(tmp_path):
    config = transformers.AutoConfig.for_model(
        "mistral3",
        text_config=TEXT,
        vision_config={**PIXTRAL, "num_attention_heads": 2, "image_size": 32},
        image_token_index=9,
    )
    transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "whole")
    with pytest.raises(InputError, match=r"mistral3.*text model of type 'ministral3'.*by itself"):
        _ = HFModel.open(str(tmp_path / "whole")).sizes
    page = (ROOT / "docs" / "models.md").read_text()
    [example] = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names = {"whole_model": str(tmp_path / "whole"), "text_model": str(tmp_path / "text")}
    exec(example, names)
    source = HFModel.open(names["text_model"])
    shapes = WeightMap(source.sizes, source.vocab_size).hf_shapes()
    HFTensors(tmp_path / "text").match(shapes)
    assert source.sizes.architecture.query_growth == 0.1


def test_how_queries_grow_must_be_known(tmp_path):
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    parts = {"model_type": "ministral3", "num_key_value_heads": 2, "head_dim": 16}
    growing = {**rope, "llama_4_scaling_beta": 0.3}
    read = write(tmp_path, **parts, rope_parameters=growing).sizes.architecture
    assert (read.query_growth, read.query_growth_length) == (0.3, 16)
    constant = {**rope, "llama_4_scaling_beta": 0.0}
    assert write(tmp_path, **parts, rope_parameters=constant).sizes.architecture.is_plain
    assert "llama_4_scaling_beta is None" in refusal(tmp_path, **parts, rope_parameters=rope)
    assert "llama_4_scaling_beta" in refusal(tmp_path, rope_parameters=growing)  # Llama has none


def test_an_adapter_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="there is an adapter, adapter_config.json: merge it"):
        HFModel.open(str(tmp_path))
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(InputError, match="beside the weights model.safetensors: merge it into"):
        write(tmp_path)


def test_no_call_of_transformers_runs_the_code_of_a_model():
    """By default transformers asks the terminal whether it may."""
    calls = []
    for folder in ("megatron_prefix", "tools", "examples"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and "from_pretrained" in ast.unparse(node.func):
                    calls.append(file.name)
                    assert "trust_remote_code=False" in ast.unparse(node), f"{file}:{node.lineno}"
    assert "reading.py" in calls and len(calls) > 5
