"""One process as a world of its own: what it communicates is what it has."""

from __future__ import annotations

import pytest
import torch

from megatron_prefix.config import ParallelConfig
from megatron_prefix.distributed import join_world
from megatron_prefix.errors import InputError, RunError


def test_one_process_leads_itself(world):
    assert world.is_main and world.leads_data_rank
    assert (world.data_rank, world.data_size) == (0, 1)
    assert world.sampler_layout == {"num_ranks": 1, "row_multiple": 1, "count_multiple": 1}
    assert world.context(None) is None and world.failure_detection is None
    world.beat("step 1")  # nobody hears it, and nothing fails


def test_sums_maxima_and_gathered_values_are_its_own(world):
    values = torch.tensor([1.0, 3.0])
    assert world.sum(values.clone()).tolist() == world.max(values.clone()).tolist() == [1, 3]
    assert world.gather({"rank": 0}) == [{"rank": 0}]


def test_an_action_of_the_main_process_returns_or_raises(world):
    assert world.once(lambda: "result") == "result"
    for error in (InputError("data.train: x"), KeyError("a defect")):

        def fail(error=error):
            raise error

        with pytest.raises(type(error)) as raised:
            world.once(fail)
        assert raised.value is error  # with the traceback of where it happened


def test_the_first_process_of_a_node_acts_for_it(world, monkeypatch):
    assert world.once_per_node(lambda: "result") == ["result"]
    for error in (InputError("data.train: x"), KeyError("a defect")):

        def fail(error=error):
            raise error

        with pytest.raises(type(error)) as raised:
            world.once_per_node(fail)
        assert raised.value is error
    monkeypatch.setenv("LOCAL_RANK", "1")  # another process of the node does it
    assert world.once_per_node(fail) == []


def test_a_failure_on_another_node_is_raised_here(world, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    for kind, error in (("input", InputError), ("fault", RunError)):
        outcomes = [None, ("result", 1), (kind, "data.train: x")]
        monkeypatch.setattr(type(world), "gather", lambda self, value, given=outcomes: given)
        with pytest.raises(error, match="rank 2: data.train: x"):
            world.once_per_node(lambda: 1)


def test_processes_that_do_not_fit_are_refused_before_they_meet(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with (
        pytest.raises(InputError, match="3 processes were started, .* a multiple of 2"),
        join_world(ParallelConfig(tensor_model_parallel_size=2), seed=0),
    ):
        raise AssertionError("joined")
