"""Every family against transformers: values, gradients, and files out again.

A small random model with all its features scores and differentiates trees, packed and shared;
transformers runs each response alone.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from family_models import MODELS, make_family
from small_models import logps_of, pack, weights_of
from test_hf_parity import assert_same_tensors, entries_of, responses, tensors_of

from megatron_prefix.checkpoint.agreement import check_model
from megatron_prefix.checkpoint.convert import export_hf, import_hf
from megatron_prefix.checkpoint.model_weights import model_sizes, model_state
from megatron_prefix.checkpoint.starting_model import resolve_starting_model
from megatron_prefix.checkpoint.writing import Snapshot
from megatron_prefix.config import ModelConfig
from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.errors import InputError
from megatron_prefix.estimate.memory import parameter_counts
from megatron_prefix.model.hf import HFModel, WeightMap
from megatron_prefix.model.parameters import canonical_parameters
from megatron_prefix.model.provider import model_provider
from megatron_prefix.testing import write_random_set

TOLERANCE = 1e-4
"""Of a response's log-probability, relative if it exceeds 1."""
GRADIENTS = 1e-4
"""Of a parameter's gradient, relative to its largest entry."""


OFTEN = (
    *("llama, biases, yarn", "olmo2", "smollm3", "granite", "cohere", "starcoder2", "glm4"),
    *("gemma2", "gemma3", "phi3", "qwen2 moe", "gpt-oss", "ministral3"),
    *("deepseek v3, dense", "deepseek v2", "deepseek v3"),
)
"""Models of `make test`, which have every kind of part; the others take part in `make
test-all`."""
EVERY_MODEL = pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[] if x in OFTEN else [pytest.mark.slow]) for x in MODELS]
)
FILES = ("smollm3", "phi3", "qwen2 moe", "gpt-oss", "deepseek v3")
"""The same for their files: separate and joined tensors, experts by themselves and in one,
layers of two kinds."""
EVERY_FILE = pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[] if x in FILES else [pytest.mark.slow]) for x in MODELS]
)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> str:
    """PREFIX of five random conversations."""
    return write_random_set(tmp_path_factory.mktemp("families") / "set", 0, 5)


def theirs(model: torch.nn.Module, prefix: str) -> torch.Tensor:
    """Log-probability of every response by transformers, each alone, with gradients."""
    sums = []
    for tokens, start in responses(prefix):
        ids = torch.from_numpy(tokens.astype("int64"))[None]
        logps = model(ids, use_cache=False).logits[0, start - 1 : -1].double().log_softmax(-1)
        sums.append(logps.gather(1, ids[0, start:, None]).sum())
    return torch.stack(sums)


def build(directory: Path, prefix: str, world, **settings) -> torch.nn.Module:
    """Our model of the same directory."""
    config = ModelConfig(hf=str(directory), **settings)
    initial = resolve_starting_model(config, [PreferenceDataset(prefix)])
    model = model_provider(config=initial.transformer_config(0), pg_collection=world.groups)
    initial.load([model])
    return model


IN_MEMORY = {
    "block_sparse_moe": "mlp",
    ".w1.": ".gate_proj.",
    ".w2.": ".down_proj.",
    ".w3.": ".up_proj.",
}
"""Mixtral's names in files, and in memory."""


def gradient_of(named: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """The gradient of a stored tensor; in memory, transformers joins experts, gate and up."""
    for old, new in IN_MEMORY.items():
        name = name.replace(old, new)
    if name in named:
        return named[name]
    before, after = name.split(".experts.")
    number, part, _ = after.split(".")
    if part == "down_proj":
        return named[f"{before}.experts.down_proj"][int(number)]
    gate, up = named[f"{before}.experts.gate_up_proj"][int(number)].chunk(2)
    return gate if part == "gate_proj" else up


def gradients_of(model: torch.nn.Module, directory: Path) -> dict[str, torch.Tensor]:
    """transformers' gradients under the canonical names."""
    source = HFModel.read(directory)
    weights = WeightMap(source.sizes, source.vocab_size, tensor_names=source.family.names)
    named = {name: p.grad for name, p in model.named_parameters()}
    buffers = {name: torch.zeros_like(x) for name, x in model.named_buffers()}  # not trained

    def read(name: str, rows: slice, columns: slice) -> torch.Tensor:
        gradient = buffers[name] if name in buffers else gradient_of(named, name)
        return gradient[rows] if gradient.dim() == 1 else gradient[rows, columns]

    return {name: weights.read(name, read) for name in weights.names()}


@EVERY_MODEL
def test_values_and_gradients_are_those_of_transformers(name, prefix, tmp_path, world):
    theirs_model = make_family(name, tmp_path)
    model = build(tmp_path, prefix, world)
    dataset = PreferenceDataset(prefix)
    ours = logps_of(model, pack([dataset[group] for group in range(len(dataset))]))
    judged = theirs(theirs_model, prefix)
    difference = ((ours - judged).abs() / judged.abs().clamp(min=1)).max().item()
    assert len(judged) > 10 and difference < TOLERANCE, difference
    weights = weights_of(len(judged))
    (ours * weights).sum().backward()
    (judged * weights).sum().backward()
    expected = gradients_of(theirs_model, tmp_path)
    named = dict(canonical_parameters(model))
    assert named.keys() == expected.keys()
    worst = 0.0
    for parameter, gradient in expected.items():
        if named[parameter].grad is None:  # not trained
            assert parameter.endswith("expert_bias") and not gradient.any()
            continue
        own = named[parameter].grad[: len(gradient)]  # the vocabulary is padded
        largest = gradient.abs().max()
        worst = max(worst, float((own - gradient).abs().max() / largest))
        assert torch.allclose(own, gradient, rtol=0, atol=GRADIENTS * float(largest)), parameter
    print(f"\n{name}: log-probabilities {difference:.1e}, gradients {worst:.1e}")


@EVERY_FILE
def test_an_import_is_what_megatron_core_saves(name, prefix, tmp_path, world):
    """The same tensors under the same keys."""
    make_family(name, tmp_path / "hf")
    import_hf(str(tmp_path / "hf"), tmp_path / "imported")
    (tmp_path / "saved").mkdir()
    model = build(tmp_path / "hf", prefix, world, make_vocab_size_divisible_by=1)
    Snapshot.of(model_state([model])).write(tmp_path / "saved")
    assert entries_of(tmp_path / "imported") == entries_of(tmp_path / "saved")


def test_a_checkpoint_of_other_parts_is_refused(prefix, tmp_path, world):
    """They change what the same parameters compute."""
    make_family("granite", tmp_path)
    saved = model_sizes([build(tmp_path, prefix, world)])
    config = json.loads((tmp_path / "config.json").read_text())
    check_model(tmp_path, saved, model_sizes([build(tmp_path, prefix, world)]))
    (tmp_path / "config.json").write_text(json.dumps({**config, "logits_scaling": 2.0}))
    with pytest.raises(InputError, match=r"architecture: .*'logits_multiplier': 0.25.* 0.5"):
        check_model(tmp_path, saved, model_sizes([build(tmp_path, prefix, world)]))


def test_key_biases_without_rotation_have_no_gradient(prefix, tmp_path, world):
    """They add the same number to all scores of a query. In float32 the rounding is left, which
    Adam divides by itself: so tests of layouts leave these entries out."""
    make_family("glm4", tmp_path)
    model = build(tmp_path, prefix, world).double()
    dataset = PreferenceDataset(prefix)
    logps = logps_of(model, pack([dataset[group] for group in range(len(dataset))]))
    (logps * weights_of(len(logps))).sum().backward()
    for layer in model.decoder.layers:
        bias = layer.self_attention.linear_qkv.bias.grad.view(2, -1, 16)  # groups, parts, channels
        rotated, others = bias[:, -2].split(8, dim=-1)
        assert others.abs().max() < 1e-12 * rotated.abs().max()


@EVERY_FILE
def test_out_again_bit_by_bit(name, tmp_path):
    make_family(name, tmp_path / "hf")
    import_hf(str(tmp_path / "hf"), tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "back", 60_000)
    assert_same_tensors(tmp_path / "hf", tmp_path / "back")
    source = HFModel.read(tmp_path / "hf")
    counted = sum(parameter_counts(source.sizes, source.vocab_size).values())
    assert counted == sum(x.numel() for x in tensors_of(tmp_path / "back").values())
    written, read = (tmp_path / folder / "config.json" for folder in ("back", "hf"))
    assert written.read_bytes() == read.read_bytes()
