"""Random configurations of every family: equal to transformers, or refused by the key's name.

Each case flips a few keys of `config.json`. If we refuse it, the message must name a key that was
flipped. Otherwise transformers builds the model from the same file, its random weights are
stored, and both compute the log-probabilities of the same responses.
"""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from config_flips import BASES, VALUES, Case, random_case
from safetensors.torch import load_file, save_file
from small_models import logps_of, pack
from test_hf_parity import responses, worst

from megatron_prefix.checkpoint import resolve_starting_model
from megatron_prefix.config import ModelConfig
from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.errors import InputError
from megatron_prefix.model.provider import model_provider
from megatron_prefix.testing import write_random_set

FEW, MANY = 40, 300
TOLERANCE = 1e-5
"""Of a log-probability, relative if it exceeds 1; float32 on both sides gives 5e-7."""
_LENGTHS = {"max_position_embeddings", "original_max_position_embeddings"}
RELATED = {
    "sliding_window": {"use_sliding_window", "max_window_layers", "layer_types"},
    "num_experts": {"num_local_experts"},
    "moe_router_topk": {"num_experts_per_tok"},
    "num_experts_per_tok": {"num_experts", "num_local_experts"},
    "layer_types": {"num_hidden_layers"},
    "mlp_layer_types": {"num_hidden_layers"},
    "layer types": {"num_hidden_layers", "layer_types"},
    "token": {"vocab_size"},
    "query heads": {"num_attention_heads", "num_key_value_heads", "head_dim"},
    "num_attention_heads": {"hidden_size"},
    "rope": {"rope_parameters", "rope_scaling", "partial_rotary_factor"},
    "llama_4_scaling_beta": {"rope_parameters", "rope_scaling"},
    "short_factor": {"rope_parameters", "rope_scaling", "partial_rotary_factor", "head_dim"},
    "no_rope_layers": {"num_hidden_layers"},
    "longest path": {"rope_parameters", "rope_scaling", *_LENGTHS},
    "rotary scaling": {"rope_parameters", "rope_scaling"},
    "factor": {"rope_parameters", "rope_scaling"},
    "number of attention heads": {"hidden_size", "num_attention_heads"},
    "num_key_value_heads": {"num_attention_heads"},
    "head_dim": {"hidden_size", "num_attention_heads", "qk_rope_head_dim"},
    "n_group": {"n_routed_experts", "num_experts", "num_local_experts", "topk_group"},
    "topk_group": {"num_experts_per_tok", "n_routed_experts", "n_group", "topk_method"},
}
"""Words of a message -> keys, one of which it is about."""


@pytest.fixture(scope="module")
def small_set(tmp_path_factory) -> str:
    """PREFIX of five random conversations."""
    return write_random_set(tmp_path_factory.mktemp("fuzz") / "set", 0, 5)


@cache
def longest(prefix: str) -> int:
    return int(PreferenceDataset(prefix).response_lengths.max())


def build_by_transformers(case: Case, directory: Path) -> None:
    """Random weights of the model that transformers makes of `config.json`, stored beside it."""
    raw = (directory / "config.json").read_text()
    config = transformers.AutoConfig.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager"
    ).float()
    generator = torch.Generator().manual_seed(case.seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if parameter.dim() == 1 else 0.2 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
    if case.stored == "bfloat16":
        model.bfloat16()
    model.save_pretrained(directory, max_shard_size="40KB" if case.stored == "sharded" else "1GB")
    (directory / "config.json").write_text(raw)
    file = directory / "model.safetensors"
    tensors = load_file(file) if file.is_file() else {}
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    if case.stored == "without prefix":
        tensors = {name.removeprefix("model."): x for name, x in tensors.items()}
    elif tensors and head not in tensors and case.stored == "only the head":
        tensors[head] = tensors.pop(embedding)
    elif tensors and head not in tensors and case.stored == "both, equal":
        tensors[head] = tensors[embedding].clone()
    if tensors:
        save_file(tensors, file, {"format": "pt"})


@torch.no_grad()
def by_transformers(directory: Path, prefix: str) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    model.config.return_dict = True  # without it, transformers' own language models fail
    sums = []
    for tokens, start in responses(prefix):
        ids = torch.from_numpy(tokens.astype(np.int64))[None]
        logits = model(ids).logits
        logps = logits[0, start - 1 : -1].double().log_softmax(-1)
        sums.append(float(logps.gather(1, ids[0, start:, None]).sum()))
    return np.array(sums)


def about(message: str) -> set[str]:
    """Keys that a message may be about."""
    named = {key for key in VALUES if key in message}
    return named.union(*(keys for words, keys in RELATED.items() if words in message))


@torch.no_grad()
def outcome(case: Case, directory: Path, prefix: str, world) -> str:
    """`same`, `refused` or `transformers fails`; anything else is a failure of the test."""
    (directory / "config.json").write_text(json.dumps(case.config))
    dataset = PreferenceDataset(prefix)
    try:
        initial = resolve_starting_model(ModelConfig(hf=str(directory)), [dataset])
        config = initial.transformer_config(0)
    except InputError as error:
        assert about(str(error)) & set(case.flips), f"{case}: {error}"
        return "refused"
    try:
        build_by_transformers(case, directory)
        judged = by_transformers(directory, prefix)
    except (TypeError, ValueError):
        return "transformers fails"  # as with head_dim null, where only some classes have a default
    model = model_provider(config=config, pg_collection=world.groups)
    initial.load([model])
    row = pack([dataset[group] for group in range(len(dataset))])
    difference = worst(logps_of(model, row).numpy(), judged)
    assert difference < TOLERANCE, f"{case}: log-probabilities differ by {difference:.1e}"
    return "same"


def run(seeds: range, small_set: str, folder: Path, world) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    for seed in seeds:
        (folder / str(seed)).mkdir()
        case = random_case(seed, longest(small_set))
        outcomes[outcome(case, folder / str(seed), small_set, world)] += 1
    return outcomes


def test_a_few_configurations(small_set, tmp_path, world):
    # steps of 31 visit every family and keys of the whole list
    seeds = range(0, 31 * FEW, 31)
    outcomes = run(seeds, small_set, tmp_path, world)
    assert outcomes["same"] > FEW / 4 and outcomes["refused"] > FEW / 8, outcomes
    assert outcomes["transformers fails"] < FEW / 10, outcomes


@pytest.mark.slow
def test_many_configurations(small_set, tmp_path, world):
    outcomes = run(range(1000, 1000 + MANY), small_set, tmp_path, world)
    assert outcomes["same"] > MANY / 4 and outcomes["refused"] > MANY / 8, outcomes
    assert outcomes["transformers fails"] < MANY / 20, outcomes


@pytest.mark.parametrize("kind", BASES)
def test_every_key_of_a_family_is_flipped(kind):
    keys = set(transformers.AutoConfig.for_model(kind).to_dict()) - {"model_type"}
    assert keys - VALUES.keys() == set()
    flipped = {key for seed in range(1000, 1000 + MANY) for key in random_case(seed, 9).flips}
    assert flipped == VALUES.keys()
