"""Steps are prepared ahead, in order, once each, and failures come out where they are asked for."""

import threading
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch

from megatron_prefix.train.feed import Feed

WORLD = SimpleNamespace(device=torch.device("cpu"), data_rank=0)


class Steps:
    """A sampler that notes what it was asked for, and on which thread."""

    def __init__(self, failing: int | None = None) -> None:
        self.asked, self.threads, self.failing = [], set(), failing

    def step(self, step: int):
        self.asked.append(step)
        self.threads.add(threading.current_thread().name)
        if step == self.failing:
            raise OSError(f"step {step} cannot be read")
        return SimpleNamespace(step=step, weight=1.0)

    def micro_batches(self, plan, rank):
        return []


def test_every_step_comes_once_and_in_order():
    sampler = Steps()
    with closing(Feed(sampler, WORLD, None, 5)) as feed:
        assert [feed.step(i).plan.step for i in range(5)] == list(range(5))
    assert sampler.asked == list(range(5))
    assert threading.current_thread().name not in sampler.threads


def test_the_next_step_is_prepared_without_being_asked_for():
    sampler, is_prepared = Steps(), threading.Event()
    plan = sampler.step
    sampler.step = lambda step: (step == 2 and is_prepared.set()) or plan(step)
    with closing(Feed(sampler, WORLD, None, 5)) as feed:
        feed.step(1)
        assert is_prepared.wait(timeout=60)


def test_another_step_than_the_next_one():
    sampler = Steps()
    with closing(Feed(sampler, WORLD, None, 9)) as feed:
        assert feed.step(2).plan.step == 2
        assert feed.step(7).plan.step == 7


def test_nothing_is_prepared_behind_the_last_step():
    sampler = Steps()
    with closing(Feed(sampler, WORLD, None, 3)) as feed:
        feed.step(2)
    assert sampler.asked == [2]


def test_a_failure_is_raised_at_its_own_step():
    with closing(Feed(Steps(failing=1), WORLD, None, 3)) as feed:
        assert feed.step(0).plan.step == 0
        with pytest.raises(OSError, match="step 1 cannot be read"):
            feed.step(1)
