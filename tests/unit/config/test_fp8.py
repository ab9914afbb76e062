"""model.fp8: what its settings must agree on, row lengths, and what it needs of the machine."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from test_config import GOOD

from megatron_prefix.config import ModelConfig, parse_config
from megatron_prefix.errors import InputError
from megatron_prefix.estimate import named_hardware, plan_run
from megatron_prefix.model import precision, transformer_config
from megatron_prefix.model.precision import fp8_settings
from megatron_prefix.reference import model as reference
from megatron_prefix.testing import write_random_set
from megatron_prefix.train.machine_notes import machine_notes
from megatron_prefix.train.rounding import rounding_of

SIZES = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4}
FP8 = {"fp8": "hybrid", "dtype": "bfloat16"}


def parsed(**model):
    raw = copy.deepcopy(GOOD)
    raw["model"] = SIZES | model
    return parse_config(raw)


def test_the_recipe_decides_the_multiple_of_tokens():
    multiples = {
        recipe: parsed(**FP8, fp8_recipe=recipe).model.token_multiple
        for recipe in ("delayed", "tensorwise", "mxfp8", "blockwise")
    }
    assert multiples == {"delayed": 16, "tensorwise": 16, "mxfp8": 32, "blockwise": 128}
    assert parsed().model.token_multiple == 1 and parsed(**FP8).model.recipe == "tensorwise"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"fp8_recipe": "tensorwise"}, "fp8_recipe = tensorwise has no effect without model.fp8"),
        ({"first_last_layers_bf16": True}, "first_last_layers_bf16 = True has no effect"),
        ({"fp8": "hybrid"}, "fp8 = hybrid with model.dtype: float32"),
        (
            FP8 | {"fp8_recipe": "delayed", "first_last_layers_bf16": True},
            "first_last_layers_bf16 = True with model.fp8_recipe: delayed",
        ),
        (FP8 | {"first_last_layers_bf16": True}, "num_layers = 2 leaves no layer in FP8"),
        (FP8 | {"ffn_hidden_size": 100}, "ffn_hidden_size = 100 is not a multiple of 16"),
        (FP8 | {"fp8_param_gather": True}, "unknown key model.fp8_param_gather"),
    ],
)
def test_settings_that_do_not_agree_are_refused(model, message):
    with pytest.raises(InputError, match=message):
        parsed(**model)


def test_it_is_refused_without_cuda():
    with pytest.raises(InputError, match="model.fp8 = hybrid runs on CUDA"):
        transformer_config(ModelConfig(**SIZES, **FP8), vocab_size=64, seed=1)


@pytest.fixture
def machine(monkeypatch):
    """`machine(capability, has_engine)`: the device that torch says is there."""

    def machine(capability: tuple[int, int], has_engine: bool = True) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(precision, "has_transformer_engine", lambda: has_engine)
        monkeypatch.setattr(
            precision, "uses_transformer_engine", lambda parts: parts == "plain" and has_engine
        )

    return machine


@pytest.mark.parametrize(
    ("capability", "has_engine", "parts", "recipe", "message"),
    [
        ((9, 0), False, "plain", None, "needs Transformer Engine's layers: install"),
        ((9, 0), True, "other", None, "parts that Transformer Engine's layers do not have"),
        ((8, 0), True, "plain", None, "tensorwise needs compute capability 8.9.*has 8.0"),
        ((8, 9), True, "plain", "blockwise", "blockwise needs compute capability 9.0"),
        ((9, 0), True, "plain", "mxfp8", "mxfp8 needs compute capability 10.0"),
    ],
)
def test_it_is_refused_where_it_cannot_run(machine, capability, has_engine, parts, recipe, message):
    machine(capability, has_engine)
    with pytest.raises(InputError, match=message):
        fp8_settings(ModelConfig(**SIZES, **FP8, fp8_recipe=recipe), parts)


def test_megatrons_settings(machine):
    machine((9, 0))
    settings = fp8_settings(ModelConfig(**SIZES, **FP8, first_last_layers_bf16=True), "plain")
    assert settings["fp8"] == "hybrid" and settings["fp8_recipe"] == "tensorwise"
    assert settings["first_last_layers_bf16"] is True
    assert fp8_settings(ModelConfig(**SIZES), "plain") == {}


def test_budgets_and_notes_know_of_it():
    config = transformer_config(ModelConfig(**SIZES, dtype="bfloat16"), vocab_size=64, seed=1)
    plain = rounding_of(config)
    config.fp8, config.fp8_recipe = "hybrid", "delayed"
    assert rounding_of(config) == 16 * plain and config.token_multiple == 16
    assert any("checkpoints have no scales" in x for x in machine_notes(config, True, "2.20"))
    config.fp8_recipe = "tensorwise"
    assert not any("scales" in x for x in machine_notes(config, True, "2.20"))


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_rows_are_rounded_up_for_every_ranks_products(tmp_path, recipe):
    data = write_random_set(tmp_path / "set", 2, 8)
    raw = copy.deepcopy(GOOD)
    raw["data"] = {"train": data, "row_capacity": 256, "global_batch_size": 4}
    raw["model"] = SIZES | FP8 | {"fp8_recipe": recipe}
    raw["parallel"] = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    config = parse_config(raw | {"logging": {"output": str(tmp_path / "run")}})
    longest = plan_run(config, world_size=2)["data"]["longest_row"]
    assert longest % (2 * config.model.token_multiple) == 0


def test_log_probabilities_of_another_recipe_are_another_reference(monkeypatch):
    monkeypatch.setattr(reference, "model_fingerprint", lambda *_, **__: "weights")
    monkeypatch.setattr(reference, "unwrap", lambda chunk: chunk)

    def name(**settings) -> str:
        config = SimpleNamespace(lora=None, first_last_layers_bf16=False, **settings)
        return reference.reference_fingerprint([SimpleNamespace(config=config)], None)

    assert name(fp8=None) == "weights"
    names = [name(fp8="hybrid", fp8_recipe=x) for x in ("delayed", "tensorwise")]
    assert len({"weights", *names}) == 3


def test_times_are_not_estimated_for_it():
    with pytest.raises(InputError, match="model.fp8 = hybrid with --gpu"):
        plan_run(parsed(**FP8), machine=named_hardware("H100"))
