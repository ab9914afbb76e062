"""Models that read images: shared trees here against transformers on separate sequences.

Every response's log-probability and every gradient, in float64, except for norms, which
transformers computes in float32. Negative controls: placeholders, features and positions that are
wrong by a little.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from image_models import (
    FAMILIES,
    GROUPS,
    RandomPictures,
    alone_logps,
    hf_model,
    image_row,
    save,
)

from megatron_prefix.config import ModelConfig
from megatron_prefix.engine.batch import to_device
from megatron_prefix.model.hf import WeightMap
from megatron_prefix.model.hf.config import HFModel
from megatron_prefix.model.logps import response_logps
from megatron_prefix.model.parameters import whole_parameters
from megatron_prefix.model.provider import load_hf_weights, model_provider, transformer_config

CPU = torch.device("cpu")
CLOSE = 2e-6
"""Of log-probabilities of about -10; norms in float32 have 24 bits."""
WEIGHTS = torch.linspace(-1, 1, 9, dtype=torch.float64)


@cache
def theirs(family: str):
    """transformers' model, pictures for it, and how many features each has."""
    model, pictures = hf_model(family), RandomPictures.make(family, 4)
    with torch.no_grad():
        return model, pictures, pictures.num_tokens(model)


@cache
def expected(family: str) -> torch.Tensor:
    model, pictures, lengths = theirs(family)
    with torch.no_grad():
        return alone_logps(model, GROUPS, pictures, lengths)


def ours(world, folder, family, **settings):
    """The same model here, from the files that transformers writes."""
    model, _, _ = theirs(family)
    save(model, folder)
    model.double()
    config = transformer_config(ModelConfig(hf=str(folder), **settings), seed=None)
    own = model_provider(config=config, pg_collection=world.groups)
    load_hf_weights(own, folder)
    return own.double()


def batch_of(row, pictures, params=None, images=None):
    batch = to_device(row, CPU, pictures=pictures)
    return replace(
        batch,
        params=replace(batch.params, **(params or {})),
        images=replace(batch.images, **(images or {})),
    )


def logps_of(model, batch):
    values = model(batch.tokens, None, None, **batch.model_inputs)
    return response_logps(values, batch.response_order, batch.response_offsets)


def worst(logps, family) -> float:
    return float((logps.detach() - expected(family)).abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_equal_those_of_transformers(world, tmp_path, family):
    _, pictures, lengths = theirs(family)
    own = ours(world, tmp_path, family)
    row = image_row(GROUPS, pictures, lengths, multiple=8)
    with torch.no_grad():
        assert worst(logps_of(own, batch_of(row, pictures)), family) < CLOSE


@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_images_are_noticed(world, tmp_path, family):
    _, pictures, lengths = theirs(family)
    own = ours(world, tmp_path, family)
    row = image_row(GROUPS, pictures, lengths)
    right = to_device(row, CPU, pictures=pictures).images
    moved = {"places": right.places + 1}
    reordered = {"sources": right.sources.flip(0)}
    others = np.roll(row.images.encoded_ids, 2)
    changes = [moved, reordered]
    with torch.no_grad():
        for change in changes:
            assert worst(logps_of(own, batch_of(row, pictures, images=change)), family) > 1e-2
        if family.startswith("llava") and family != "llava_onevision":  # all of one size
            shared = replace(row, images=replace(row.images, encoded_ids=others))
            assert worst(logps_of(own, batch_of(shared, pictures)), family) > 1e-2
        if family == "qwen2_5_vl":
            axes = to_device(row, CPU, pictures=pictures).params.axes
            for wrong in (None, axes[[0, 2, 1]]):
                batch = batch_of(row, pictures, params={"axes": wrong})
                assert worst(logps_of(own, batch), family) > 1e-3


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_those_of_transformers(world, tmp_path, family, recompute):
    """Of tower, projector and language model, all trained, and of the row without images, whose
    vision part has a gradient of zero."""
    model, pictures, lengths = theirs(family)
    settings = {"vision": {"freeze_tower": False}}
    if recompute:
        settings |= {"recompute_granularity": "full", "recompute_method": "uniform"}
        settings |= {"recompute_num_layers": 1}
    own = ours(world, tmp_path, family, **settings)
    row = image_row(GROUPS, pictures, lengths)
    own.train()
    (logps_of(own, batch_of(row, pictures)) * WEIGHTS).sum().backward()
    model.zero_grad()
    (alone_logps(model, GROUPS, pictures, lengths) * WEIGHTS).sum().backward()
    gradients = hf_gradients(own, HFModel.read(tmp_path))
    trained = 0
    for name, parameter in model.named_parameters():
        own_name = HFModel.read(tmp_path).images.own_name(name)
        if own_name == "lm_head.weight" and own_name not in gradients:
            continue  # tied
        gradient = gradients.pop(own_name)
        if parameter.grad is None:
            assert gradient is None, name
            continue
        size = parameter.grad.abs().max()
        assert gradient is not None, name
        assert float((gradient - parameter.grad).abs().max()) < 1e-5 * float(size) + 1e-9, name
        trained += 1
    assert not gradients
    assert trained > 20


def hf_gradients(own, source):
    """Gradients by the names of Hugging Face's tensors; None for what is frozen."""
    weights = WeightMap.of(source)
    gradients = {}
    parameters = dict(own.named_parameters())
    for name, _ in whole_parameters(own):
        gradient = parameters[name].grad
        if gradient is not None:
            gradients |= weights.split(name, gradient[: weights.shape(name)[0]])
        else:
            gradients |= dict.fromkeys(weights.hf_names(name))
    return gradients
