"""Steps are prepared ahead, in order, once each, and failures are raised at their own step."""

import threading
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_prefix.attention.backends import flex
from megatron_prefix.data.steps.collate import RowItem, collate_packed
from megatron_prefix.data.steps.sharing import view
from megatron_prefix.data.tree import build_tree
from megatron_prefix.engine.batch import to_device
from megatron_prefix.engine.feed import Feed
from megatron_prefix.testing import random_group

WORLD = SimpleNamespace(device=torch.device("cpu"), data_rank=0, context=lambda config: None)
CONFIG = SimpleNamespace(
    vision=None,
    tree_attention_backend="auto",
    params_dtype=torch.float32,
    kv_channels=16,
    num_layers=2,
    window_size=(2, 0),
    window_attn_skip_freq=[0, 1],
    softmax_type="vanilla",
)


class Steps:
    """A sampler that notes what it was asked for, and on which thread."""

    def __init__(self, failing: int | None = None) -> None:
        self.asked, self.threads, self.failing = [], set(), failing

    def step(self, step: int):
        self.asked.append(step)
        self.threads.add(threading.current_thread().name)
        if step == self.failing:
            raise OSError(f"step {step} cannot be read")
        return SimpleNamespace(step=step, denominators=None, is_divided=False)

    def micro_batches(self, plan, rank):
        return []


def test_every_step_comes_once_and_in_order():
    sampler = Steps()
    with closing(Feed(sampler, WORLD, CONFIG, 5)) as feed:
        assert [feed.step(i).plan.step for i in range(5)] == list(range(5))
    assert sampler.asked == list(range(5))
    assert threading.current_thread().name not in sampler.threads


def test_the_next_step_is_prepared_without_being_asked_for():
    sampler, is_prepared = Steps(), threading.Event()
    plan = sampler.step
    sampler.step = lambda step: (step == 2 and is_prepared.set()) or plan(step)
    with closing(Feed(sampler, WORLD, CONFIG, 5)) as feed:
        feed.step(1)
        assert is_prepared.wait(timeout=60)


def test_another_step_than_the_next_one():
    sampler = Steps()
    with closing(Feed(sampler, WORLD, CONFIG, 9)) as feed:
        assert feed.step(2).plan.step == 2
        assert feed.step(7).plan.step == 7


def test_nothing_is_prepared_after_the_last_step():
    sampler = Steps()
    with closing(Feed(sampler, WORLD, CONFIG, 3)) as feed:
        feed.step(2)
    assert sampler.asked == [2]


def test_a_failure_is_raised_at_its_own_step():
    with closing(Feed(Steps(failing=1), WORLD, CONFIG, 3)) as feed:
        assert feed.step(0).plan.step == 0
        with pytest.raises(OSError, match="step 1 cannot be read"):
            feed.step(1)


@pytest.mark.parametrize(("backend", "planned"), [("auto", "path"), ("flex", "block_mask")])
def test_attention_is_planned_on_the_thread(backend, planned, monkeypatch):
    """So that the first layer finds its plan there."""
    runs = replace(flex.BACKEND, why_not=lambda *_: None)
    monkeypatch.setattr(flex, "BACKEND", runs)
    tree = build_tree(*random_group(np.random.default_rng(0)))
    seen = view(tree, "tree", 0)
    row = collate_packed([RowItem(group=0, view=seen, pair_weights=np.ones(len(seen.pairs)))])
    sampler = Steps()
    sampler.micro_batches = lambda plan, rank: [row]
    config = SimpleNamespace(**{**vars(CONFIG), "tree_attention_backend": backend})
    with closing(Feed(sampler, WORLD, config, 1)) as feed:
        (batch,) = feed.step(0).batches
    for window in (None, 3):
        plan = batch.params.plan_of(window)
        assert planned in {**vars(plan), **plan._built}, window


def test_offsets_on_the_host_are_those_of_the_targets_rows():
    tree = build_tree(*random_group(np.random.default_rng(1)))
    seen = view(tree, "tree", 0)
    row = collate_packed([RowItem(group=0, view=seen, pair_weights=np.ones(len(seen.pairs)))])
    params = to_device(row, torch.device("cpu")).params
    counts = torch.bincount(params.logit_of_target, minlength=len(params.logit_tokens))
    assert (
        params.target_offsets[0] == 0 and np.diff(params.target_offsets).tolist() == counts.tolist()
    )
    assert counts.max() > 1, "a branch point predicts several"
