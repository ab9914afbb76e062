"""The reference of own responses and mismatches in one tree: the same values, fewer tokens."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from labelled_sets import write_labelled_set
from small_runs import configure, prepare

from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.data.store.roles import own_responses
from megatron_prefix.distributed.world import join_world
from megatron_prefix.reference import model as references
from megatron_prefix.train import mismatches

STEPS = 4
"""A step of four groups crosses the end of an epoch of seven, and has a group twice."""


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> str:
    return write_labelled_set(tmp_path_factory.mktemp("joint") / "set", 5, 7, mismatches=True)


@contextlib.contextmanager
def started(folder, labelled: str, **data):
    data = {"global_batch_size": 4, "seed": 1, **data}
    loss, steps = {"loss_type": "kto"}, {"steps": STEPS}
    config = configure(folder, labelled, data=data, loss=loss, train=steps)
    with join_world(config.parallel, config.train.seed) as world:
        run = prepare(config, world)
        try:
            yield run
        finally:
            run.close()


def largest_own_tree(labelled: str) -> int:
    return int(own_responses(PreferenceDataset(labelled)).groups_num_tokens().max())


@pytest.mark.parametrize("is_cut", [False, True])
def test_each_response_has_its_own_reference(labelled, tmp_path, monkeypatch, is_cut):
    """Own trees fit rows of this capacity; with their mismatch some do not, and are cut."""
    capacity = largest_own_tree(labelled) if is_cut else 200
    passes = []
    sound = mismatches.mismatch_pass

    def noted(chunks, step, batches, world):
        passes.append((step, batches))
        return sound(chunks, step, batches, world)

    monkeypatch.setattr(mismatches, "mismatch_pass", noted)
    twice = cut = 0
    with started(tmp_path, labelled, row_capacity=capacity) as run:
        for number in range(STEPS):
            step = run.feed.step(number)
            twice += len(np.unique(step.plan.groups)) < len(step.plan.groups)
            cut += run.joint.step(number).is_divided
            joint, _ = run.mismatch_steps.attach(number, step.rows, step.batches)
            alone = run.reference.attach(step.rows, step.batches, number)
            other, scored = passes[-1]
            joint += scored
            alone += run.reference.attach(other.rows, other.batches, number)
            for ours, theirs in zip(joint, alone, strict=True):
                assert ours.ref_logps.dtype == theirs.ref_logps.dtype
                assert (ours.ref_logps - theirs.ref_logps).abs().max() < 1e-4
    values = np.unique(np.round(np.concatenate([row.ref_logps for row in joint]), 2))
    assert len(values) > 6, "responses have about the same value: a wrong place would not show"
    assert twice == 1 and bool(cut) == is_cut


def test_the_reference_computes_a_prompt_once(labelled, tmp_path, monkeypatch):
    tokens = []
    sound = references.score_rows

    def counted(chunks, batches):
        tokens.append(sum(batch.tokens.numel() for batch in batches))
        return sound(chunks, batches)

    monkeypatch.setattr(references, "score_rows", counted)
    with started(tmp_path, labelled, row_capacity=200) as run:
        groups = run.sampler.step(0).groups
        assert run.reference.rounding > 0, "the first step is checked as if the rows were the same"
        run.train_step()
    assert tokens == [PreferenceDataset(labelled).groups_num_tokens()[groups].sum()]


def test_without_shared_prompts_both_have_rows_of_their_own(labelled, tmp_path):
    with started(tmp_path, labelled, sharing="response", row_capacity=200) as run:
        assert run.joint is None and run.reference.rounding == 0
        run.train_step()
