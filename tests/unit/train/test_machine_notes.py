"""What a run on CUDA says about the machine at its start."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import SIZES

from megatron_prefix.config import ModelConfig
from megatron_prefix.model.provider import transformer_config
from megatron_prefix.train import machine_notes as module
from megatron_prefix.train.machine_notes import machine_notes

EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 16}


def notes(engine, is_on_cuda=True, grouped=False, **model):
    config = transformer_config(ModelConfig(**SIZES, **model), vocab_size=320, seed=1)
    config.moe_grouped_gemm = grouped
    return [*machine_notes(config, is_on_cuda, engine)]


def test_experts_one_after_another_are_said():
    (line,) = notes(None, **EXPERTS)
    assert "one after another" in line and "Install 'transformer-engine[pytorch]'" in line
    (line,) = notes("2.20.2", **EXPERTS)  # not grouped, although the layers could be
    assert "adapters of experts" in line
    assert notes("2.20.2", grouped=True, **EXPERTS) == notes(None) == []
    assert notes(None, is_on_cuda=False, **EXPERTS) == []


@pytest.mark.parametrize(
    ("engine", "tested"), [("2.8.0", False), ("2.9", True), ("2.20.2", True), ("2.21.0", False)]
)
def test_an_untested_engine_is_said(engine, tested):
    lines = notes(engine)
    assert (lines == []) is tested
    if not tested:
        assert f"Transformer Engine {engine} is installed" in lines[0] and ">=2.9,<2.21" in lines[0]


def test_the_tested_versions_are_those_of_the_extra():
    least, below = module.TESTED
    text = (Path(__file__).parents[3] / "setup.py").read_text(encoding="utf-8")
    assert f'"te": ["transformer-engine[pytorch]>={least},<{below}"]' in text


def test_the_installed_engine(monkeypatch):
    monkeypatch.setattr(module.importlib.metadata, "version", lambda name: "2.20.2")
    assert module.transformer_engine_version() == "2.20.2"
