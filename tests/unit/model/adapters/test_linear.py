"""Adapted linear layers: which factors there are, how they start, and Transformer Engine's."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from tiny_models import SIZES

from megatron_prefix.config import ModelConfig
from megatron_prefix.config.lora import LoraConfig
from megatron_prefix.model.adapters import with_adapters, without_adapters
from megatron_prefix.model.layers.norm import RMSNorm
from megatron_prefix.model.parameters import canonical_parameters, model_fingerprint
from megatron_prefix.model.provider import model_provider, transformer_config
from megatron_prefix.platform import submodules_of

TE_MODULE = "megatron.core.extensions.transformer_engine"
OURS = "megatron_prefix.model.adapters.te_linear"


def adapted_model(world, seed: int = 1, adapter_seed: int = 2, lora=None, **settings):
    config = transformer_config(
        ModelConfig(**{**SIZES, "num_layers": 2, **settings}),
        vocab_size=320,
        seed=seed,
        lora=lora or LoraConfig(r=3),
        adapter_seed=adapter_seed,
    )
    return model_provider(config=config, pg_collection=world.groups)


def adapters_of(model) -> dict[str, torch.Tensor]:
    return {name: x for name, x in canonical_parameters(model) if ".adapters." in name}


def test_every_named_layer_has_factors_of_its_own(world):
    names = {name.partition(".adapters.")[2] for name in adapters_of(adapted_model(world))}
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert names == {f"{target}.lora_{factor}" for target in targets for factor in "AB"}
    few = LoraConfig(r=3, target_modules=("v_proj", "up_proj"), layers_to_transform=(1,))
    names = set(adapters_of(adapted_model(world, lora=few)))
    attention, feed_forward = "self_attention.linear_qkv", "mlp.linear_fc1"
    assert names == {
        f"decoder.layers.1.{owner}.adapters.{target}.lora_{factor}"
        for owner, target in ((attention, "v_proj"), (feed_forward, "up_proj"))
        for factor in "AB"
    }


def test_factors_start_as_in_peft_and_by_name(world):
    """B is 0, A uniform in +-1 / sqrt(in); the same for the same seed and name, whatever else."""
    first = adapters_of(adapted_model(world))
    for name, factor in first.items():
        if name.endswith("lora_B"):
            assert not factor.any()
            continue
        bound = 1 / math.sqrt(factor.size(1))
        assert 0.8 * bound < factor.abs().max() <= bound
        assert abs(float(factor.std()) / (bound / math.sqrt(3)) - 1) < 0.3
    few = LoraConfig(r=3, target_modules=("v_proj",), layers_to_transform=(1,))
    alone = adapters_of(adapted_model(world, seed=9, lora=few))
    assert all(torch.equal(x, first[name]) for name, x in alone.items()) and alone
    other = adapters_of(adapted_model(world, adapter_seed=3))
    assert not any(torch.equal(x, first[n]) for n, x in other.items() if n.endswith("lora_A"))


def test_only_adapters_and_whole_copies_are_trained(world):
    lora = LoraConfig(r=3, modules_to_save=("lm_head",))
    trained = {n for n, x in adapted_model(world, lora=lora).named_parameters() if x.requires_grad}
    assert {name for name in trained if ".adapters." not in name} == {
        "saved_modules.lm_head.weight"
    }
    assert len(trained) == 1 + 2 * 7 * 2
    reward = adapted_model(world, kind="reward")
    trained = {name for name, x in reward.named_parameters() if x.requires_grad}
    assert {name for name in trained if ".adapters." not in name} == {"score.weight"}


def test_the_fingerprint_is_that_of_the_base(world):
    config = transformer_config(ModelConfig(**SIZES, kind="lm"), vocab_size=320, seed=1)
    base = model_fingerprint([model_provider(config=config, pg_collection=world.groups)])
    model = adapted_model(world, num_layers=1, lora=LoraConfig(r=3, modules_to_save=("lm_head",)))
    assert model_fingerprint([model]) == base
    with_adapters_ = {model_fingerprint([model], with_adapters=True)}
    with torch.no_grad():
        next(iter(adapters_of(model).values())).add_(1)
    with_adapters_.add(model_fingerprint([model], with_adapters=True))
    other = adapted_model(world, num_layers=1, lora=LoraConfig(r=3, lora_alpha=4.0))
    with_adapters_.add(model_fingerprint([other], with_adapters=True))
    assert len(with_adapters_ | {base}) == 4


def stub(monkeypatch) -> ModuleType:
    """Transformer Engine's layers as Megatron-Core wraps them, with local ones inside."""
    module = ModuleType(TE_MODULE)
    for name, local in (
        ("TEColumnParallelLinear", ColumnParallelLinear),
        ("TERowParallelLinear", RowParallelLinear),
        ("TENorm", RMSNorm),
    ):
        setattr(module, name, type(name, (local,), {}))
    monkeypatch.setitem(sys.modules, TE_MODULE, module)
    monkeypatch.delitem(sys.modules, OURS, raising=False)
    return module


def test_layers_of_transformer_engine_get_the_normed_input(world, monkeypatch):
    config = adapted_model(world).config
    module = stub(monkeypatch)
    try:
        layer = get_gpt_layer_local_spec(normalization="RMSNorm")
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = None  # fused
        layer.submodules.sharded_state_dict_keys_map = {}
        parts = with_adapters(layer, LoraConfig(r=3).resolved(False), True).submodules
        assert parts.input_layernorm is module.TENorm is parts.pre_mlp_layernorm
        attention, mlp = submodules_of(parts.self_attention), submodules_of(parts.mlp)
        bases = module.TEColumnParallelLinear, module.TERowParallelLinear
        for linear, base in (
            (attention.linear_qkv, bases[0]),
            (attention.linear_proj, bases[1]),
            (mlp.linear_fc1, bases[0]),
            (mlp.linear_fc2, bases[1]),
        ):
            assert issubclass(linear, base)
        names = parts.sharded_state_dict_keys_map
        assert names["input_layernorm."] == "self_attention.linear_qkv.layer_norm_"
        layer = attention.linear_qkv(
            16, 32, config=config, init_method=None, gather_output=False, bias=False,
            skip_bias_add=False, is_expert=False, tp_comm_buffer_name="qkv", tp_group=None,
        )  # fmt: skip
        assert set(layer.adapters) == {"q_proj", "k_proj", "v_proj"}
    finally:
        sys.modules.pop(OURS, None)


def test_a_layer_without_adapters_keeps_the_fused_norm(monkeypatch):
    stub(monkeypatch)
    try:
        layer = get_gpt_layer_local_spec(normalization="RMSNorm")
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = None
        lora = LoraConfig(r=3, target_modules=("o_proj", "down_proj")).resolved(False)
        parts = with_adapters(layer, lora, True).submodules
        assert parts.input_layernorm is None and parts.pre_mlp_layernorm is None
    finally:
        sys.modules.pop(OURS, None)


def arguments(own: ast.ClassDef, method: str) -> ast.arguments:
    return next(x.args for x in own.body if isinstance(x, ast.FunctionDef) and x.name == method)


@pytest.mark.parametrize("name", ["TEColumnParallelLinear", "TERowParallelLinear"])
def test_transformer_engines_layers_take_what_ours_pass_on(name):
    """Read from Megatron-Core's source, which cannot be imported without Transformer Engine."""
    source = Path(importlib.util.find_spec("megatron.core.extensions").origin)
    tree = ast.parse((source.parent / "transformer_engine.py").read_text())
    classes = {x.name: x for x in ast.walk(tree) if isinstance(x, ast.ClassDef)}
    init = arguments(classes[name], "__init__")
    forward = arguments(classes["TELinear"], "forward")
    assert [x.arg for x in init.args] == ["self", "input_size", "output_size"]
    assert {"config", "is_expert", "tp_group"} <= {x.arg for x in init.kwonlyargs}
    assert [base.id for base in classes[name].bases] == ["TELinear"]
    assert [x.arg for x in forward.args] == ["self", "x"]


def test_adapters_that_are_off_are_on_again_after_an_error(world):
    model = adapted_model(world)
    owners = [x for x in model.modules() if hasattr(x, "has_adapters_on")]
    with pytest.raises(ValueError), without_adapters([model]):
        assert not any(owner.has_adapters_on for owner in owners)
        raise ValueError
    assert all(owner.has_adapters_on for owner in owners) and len(owners) == 1 + 2 * 4
