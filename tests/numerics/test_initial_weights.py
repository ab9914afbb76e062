"""Initial weights are a function of the seed and the parameter's name, of nothing else."""

from __future__ import annotations

import math

import pytest
import torch
from small_models import VOCAB, make_model

from megatron_prefix.model.parameters import canonical_parameters

pytestmark = pytest.mark.sample


def test_padding_the_vocabulary_moves_no_weight(world):
    models = {n: make_model(world, make_vocab_size_divisible_by=n) for n in (1, 64, 100)}
    plain = dict(models[1].named_parameters())
    for padded in (models[64], models[100]):
        for name, parameter in padded.named_parameters():
            if parameter.dim() == 2 and parameter.size(0) != plain[name].size(0):
                assert ("word_embeddings" in name) or ("output_layer" in name)
                assert not parameter[VOCAB:].any(), "padded rows are not zero"
            assert torch.equal(parameter[: plain[name].size(0)], plain[name]), name
    assert {m.embedding.word_embeddings.weight.size(0) for m in models.values()} == {61, 64, 100}


def test_more_layers_leave_the_others_as_they_are(world):
    """But for the factor 1/sqrt(2 layers) that output projections have by definition."""
    few = dict(canonical_parameters(make_model(world)))
    many = dict(canonical_parameters(make_model(world, num_layers=5)))
    assert len(many) > len(few)
    for name, parameter in few.items():
        if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            scaled = many[name] * math.sqrt(5 / 3)
            assert torch.allclose(scaled, parameter, rtol=1e-6, atol=0), name
        else:
            assert torch.equal(many[name], parameter), name


def test_weights_follow_seed_and_name(world):
    settings = {"add_qkv_bias": True, "qk_layernorm": True}
    first, again, other = (
        dict(canonical_parameters(make_model(world, seed=seed, **settings))) for seed in (5, 5, 6)
    )
    drawn = [name for name, parameter in first.items() if parameter.dim() == 2]
    for name, parameter in first.items():
        assert torch.equal(again[name], parameter)
        assert torch.equal(other[name], parameter) == (name not in drawn)
        if name not in drawn:
            assert (parameter == (0.0 if name.endswith("bias") else 1.0)).all(), name
    values = [first[name].flatten()[:64].detach() for name in drawn]
    correlation = torch.corrcoef(torch.stack(values)).fill_diagonal_(0).abs().max()
    assert correlation < 0.6, "two parameters were drawn from one stream"
    for name in drawn:
        is_output = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        expected = 0.2 / math.sqrt(2 * 3) if is_output else 0.2
        assert abs(float(first[name][:VOCAB].std()) / expected - 1) < 0.1, name
