"""References attach the log-probabilities of a row's own responses."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import tiny_config, tiny_model

from megatron_prefix.config import LossConfig
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.engine.batch import to_device
from megatron_prefix.objectives import check
from megatron_prefix.reference import PrecomputedReference, open_reference, score_dataset
from megatron_prefix.reference.model import NoReference
from megatron_prefix.reference.places import response_index
from megatron_prefix.testing import write_random_set
from megatron_prefix.train.samplers import evaluation_sampler


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> PreferenceDataset:
    return PreferenceDataset(write_random_set(tmp_path_factory.mktemp("model") / "set", 0, 5))


def sampler_of(dataset: PreferenceDataset, folder, **data):
    data = {"row_capacity": 512, "global_batch_size": 2, **data}
    config = tiny_config(str(dataset.prefix), folder, data=data)
    return evaluation_sampler(config, check(config.loss), dataset, None, None)


def rows_of(sampler):
    steps = [sampler.step(i) for i in range(sampler.composition.num_steps(1))]
    return [row for step in steps for row in sampler.micro_batches(step)]


def test_responses_are_numbered_through_the_data_set():
    dataset = SimpleNamespace(group_responses=np.array([0, 2, 5, 7]))
    row = SimpleNamespace(response_ids=np.array([[1, 2], [0, 0], [2, 1]]))
    assert response_index(dataset, row).tolist() == [4, 0, 6]


def test_known_log_probabilities_reach_their_responses(dataset, tmp_path):
    logps = -np.arange(len(dataset.response_lengths), dtype=np.float64)
    reference = PrecomputedReference(dataset, {dataset.fingerprint: logps}, 0.0)
    sampler = sampler_of(dataset, tmp_path)
    rows = rows_of(sampler)
    batches = reference.attach(rows, [to_device(row, torch.device("cpu")) for row in rows])
    for row, batch in zip(rows, batches, strict=True):
        assert batch.ref_logps.tolist() == (-response_index(dataset, row)).tolist()
    assert reference.score(sampler) is logps


def test_an_objective_without_reference_has_none(world, tmp_path):
    objective = check(LossConfig(loss_type="bradley_terry"), "reward")
    config = tiny_config("set", tmp_path, model={"kind": "reward"})
    reference = open_reference(objective, config, None, None, [], world)
    assert isinstance(reference, NoReference)
    assert reference.attach([], ["batch"]) == ["batch"] and reference.score(None) is None


def test_scores_are_the_same_in_any_rows(world, dataset, tmp_path):
    """A response with several pairs runs several times without sharing, and gets the mean."""
    chunks = [tiny_model(world).double()]
    shared = score_dataset(chunks, sampler_of(dataset, tmp_path), world)
    alone = score_dataset(chunks, sampler_of(dataset, tmp_path, sharing="none"), world)
    assert shared.shape == dataset.response_lengths.shape and np.isfinite(shared).all()
    paired = ~np.isnan(alone)
    assert paired.any() and np.allclose(shared[paired], alone[paired], rtol=1e-9)


def test_scoring_leaves_the_model_as_it_was(world, dataset, tmp_path):
    for training in (True, False):
        chunks = [tiny_model(world).train(training)]
        score_dataset(chunks, sampler_of(dataset, tmp_path), world)
        assert chunks[0].training == training


def test_scoring_continues_from_saved_sums(world, dataset, tmp_path):
    """All steps are done: the mean of what was saved comes back, and nothing runs."""
    sampler = sampler_of(dataset, tmp_path)
    numbers = np.arange(len(dataset.response_lengths), dtype=np.float64)
    sums = np.stack([-2 * numbers, np.full_like(numbers, 2)])
    saved = SimpleNamespace(step=sampler.composition.num_steps(1), sums=sums, save=None)
    scores = score_dataset([tiny_model(world)], sampler, world, saved)
    assert np.array_equal(scores, -numbers)


def test_scoring_tells_its_steps(world, dataset, tmp_path):
    told = []
    sampler = sampler_of(dataset, tmp_path)
    score_dataset([tiny_model(world)], sampler, world, tell=lambda *steps: told.append(steps))
    num_steps = sampler.composition.num_steps(1)
    assert told == [(step, num_steps) for step in range(1, num_steps + 1)]
