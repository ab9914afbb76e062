"""The fingerprint of a model follows every weight, its name, its precision, and nothing else."""

from __future__ import annotations

import torch
from tiny_models import tiny_model

from megatron_prefix.model.parameters import model_fingerprint


def test_the_same_weights_have_the_same_fingerprint(world):
    prints = {model_fingerprint([tiny_model(world)]) for _ in range(2)}
    assert len(prints) == 1 and len(prints.pop()) == 64


def test_the_padding_of_the_vocabulary_does_not_count(world):
    """320 and 384 rows of embeddings, of which 300 are the vocabulary's."""
    models = [tiny_model(world, vocab_size=300, make_vocab_size_divisible_by=n) for n in (320, 128)]
    rows = [model.embedding.word_embeddings.weight.shape[0] for model in models]
    assert rows == [320, 384]
    assert len({model_fingerprint([model]) for model in models}) == 1


def test_every_weight_counts(world):
    model = tiny_model(world)
    prints = {model_fingerprint([model])}
    parameters = list(model.parameters())
    for parameter in parameters:
        with torch.no_grad():
            parameter.view(-1)[0] += 1
        prints.add(model_fingerprint([model]))
    assert len(prints) == len(parameters) + 1


def test_precision_and_seed_count(world):
    models = [tiny_model(world), tiny_model(world, seed=2), tiny_model(world).bfloat16()]
    assert len({model_fingerprint([model]) for model in models}) == 3


def test_a_name_counts(world):
    """Two layers with their weights exchanged."""
    model = tiny_model(world, num_layers=2)
    before = model_fingerprint([model])
    first, second = (layer.mlp.linear_fc1.weight for layer in model.decoder.layers)
    with torch.no_grad():
        kept = first.clone()
        first.copy_(second)
        second.copy_(kept)
    assert model_fingerprint([model]) != before
