"""Which rows pipeline stages send each other, in which order, and what the last one sends all."""

from __future__ import annotations

import pytest
import torch
from megatron.core.pipeline_parallel.schedules import get_schedule_table

from megatron_prefix.config import ModelConfig
from megatron_prefix.engine.pipeline import (
    RowOrder,
    RowShapes,
    schedule_arguments,
    scores_from_last_stage,
)
from megatron_prefix.model.provider import transformer_config


@pytest.mark.parametrize(("stages", "num_rows"), [(1, 3), (2, 5), (4, 2)])
def test_without_chunks_rows_come_in_their_order(stages, num_rows):
    rows = RowOrder(num_rows=num_rows, stages=stages, chunks=1)
    for stage in range(stages):
        is_last, is_first = stage == stages - 1, stage == 0
        assert [*rows.to_next(stage)] == ([] if is_last else [*range(num_rows)])
        assert [*rows.to_previous(stage)] == ([] if is_first else [*range(num_rows)])


@pytest.mark.parametrize(("stages", "chunks", "num_rows"), [(2, 2, 4), (4, 3, 8), (2, 4, 2)])
def test_chunks_take_turns_as_in_megatron_core(stages, chunks, num_rows):
    table = get_schedule_table(num_rows, chunks, stages)
    rows = RowOrder(num_rows=num_rows, stages=stages, chunks=chunks)
    forward = [row for row, _ in table]
    for stage in range(stages - 1):
        assert [*rows.to_next(stage)] == forward
        assert [*rows.to_previous(stage + 1)] == forward
    # the last stage sends to the first all but what its last chunk computes, and backward the first
    # stage sends to the last all but the gradients of its first chunk, which comes last there
    wraps = [row for row, chunk in table if chunk < chunks - 1]
    assert [*rows.to_next(stages - 1)] == [*rows.to_previous(0)] == wraps


def test_two_stages_of_two_chunks():
    rows = RowOrder(num_rows=4, stages=2, chunks=2)
    assert [*rows.to_next(0)] == [0, 1, 0, 1, 2, 3, 2, 3]
    assert [*rows.to_next(1)] == [0, 1, 2, 3]


class Group:
    """The first of two stages; nothing is sent."""

    def size(self):
        return 2

    def rank(self):
        return 0


def test_shapes_are_known_and_what_is_sent_is_checked(world, monkeypatch):
    config = transformer_config(
        ModelConfig(num_layers=2, hidden_size=8, ffn_hidden_size=8, num_attention_heads=2),
        vocab_size=320,
        seed=1,
    )
    monkeypatch.setattr(torch.distributed, "get_global_rank", lambda group, rank: rank)
    shapes = RowShapes(Group(), config, [5, 7])
    first, second = torch.empty(5, 1, 8), torch.empty(7, 1, 8)
    assert shapes._communicate_shapes(first, None, False, False) == ([0, 0, 0], [0, 0, 0])
    assert shapes._communicate_shapes(second, None, False, True) == ([0, 0, 0], [5, 1, 8])
    assert shapes._communicate_shapes(None, None, False, True) == ([0, 0, 0], [7, 1, 8])
    with pytest.raises(AssertionError, match="7, 1, 8"):
        RowShapes(Group(), config, [5, 7])._communicate_shapes(second, None, False, False)


def test_one_stage_sends_nothing(world):
    assert schedule_arguments(torch.nn.Linear(1, 1), [3]) == {}
    values = [torch.ones(2, dtype=torch.float64)]
    assert scores_from_last_stage(values, [2], world.device) is values
