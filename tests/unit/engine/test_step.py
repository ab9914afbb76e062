"""The forward step in a loop of your own: its loss, and scores without a loss."""

from functools import partial

import numpy as np
import pytest
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

import megatron_prefix as mp
from megatron_prefix.config import ParallelConfig
from megatron_prefix.data.steps.collate import RowItem, collate_packed
from megatron_prefix.data.steps.sharing import view
from megatron_prefix.data.tree import build_tree
from megatron_prefix.distributed.world import join_world
from megatron_prefix.engine import build_model, score_rows
from megatron_prefix.engine.step import response_scores
from megatron_prefix.testing import random_group

SIZES = mp.ModelConfig(num_layers=1, hidden_size=16, ffn_hidden_size=32, num_attention_heads=2)


@pytest.fixture(scope="module")
def world():
    with join_world(ParallelConfig(), seed=1) as joined:
        yield joined


@pytest.fixture(scope="module")
def model(world):
    return build_model(mp.transformer_config(SIZES, vocab_size=512, seed=1), world)


def rows(world):
    """Two rows of one group each, all of it shared."""
    for seed in (0, 1):
        seen = view(build_tree(*random_group(np.random.default_rng(seed))), "tree", 0)
        item = RowItem(group=seed, view=seen, pair_weights=np.ones(len(seen.pairs)))
        yield mp.to_device(collate_packed([item]), world.device, {"pair": 2.0})


def test_a_schedule_outside_scores_rows_with_collect_non_loss_data(world, model):
    batches = list(rows(world))
    with torch.no_grad():
        scores = get_forward_backward_func()(
            forward_step_func=partial(mp.forward_step, loss=mp.LossConfig()),
            data_iterator=iter(batches),
            model=model,
            num_microbatches=len(batches),
            seq_length=max(batch.tokens.size(1) for batch in batches),
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    expected = score_rows(model, batches)
    assert [len(x) for x in scores] == [len(batch.response_tokens) for batch in batches]
    for ours, theirs in zip(scores, expected, strict=True):
        assert ours.dtype == torch.float64 and torch.equal(ours, theirs)


def test_scores_are_sums_over_responses_without_gradient(world):
    """The model is a table of log-probabilities, one per target."""
    batch = next(rows(world))
    logps = -torch.rand(len(batch.response_order), requires_grad=True)
    table = lambda *args, packed_seq_params: logps  # noqa: E731
    output, loss_function = mp.forward_step(iter([batch]), table, loss=mp.LossConfig())
    scores = loss_function(output, non_loss_data=True)
    assert not scores.requires_grad
    bounds = batch.response_offsets.tolist()
    for score, start, end in zip(scores, bounds, bounds[1:], strict=False):
        own = batch.response_order[start:end]
        assert score.item() == pytest.approx(logps[own].double().sum().item(), rel=1e-12)


def test_without_the_flag_it_is_a_loss(world):
    batch = next(rows(world))
    logps = -torch.rand(len(batch.response_order), requires_grad=True)
    table = lambda *args, packed_seq_params: logps  # noqa: E731
    with_reference = batch.with_reference(torch.zeros(len(batch.response_tokens)).double())
    output, loss_function = mp.forward_step(iter([with_reference]), table, loss=mp.LossConfig())
    value, count, logs = loss_function(output)
    assert value.requires_grad and count == len(batch.pairs)
    losses = mp.dpo_loss(
        *with_reference.loss_inputs(response_scores(logps, batch)).scores[batch.pairs].T,
        *torch.zeros(2, len(batch.pairs), dtype=torch.float64),
        beta=0.1,
    ).losses
    assert value.item() == logs["loss"].item() == pytest.approx(losses.sum().item() / 2.0)


@pytest.mark.parametrize(
    ("loss", "message"),
    [({"ld_alpha": 0.5}, "ld_alpha"), ({"use_weighting": True}, "use_weighting")],
)
def test_rows_lack_what_they_were_not_made_with(world, loss, message):
    batch = next(rows(world))
    logps = -torch.rand(len(batch.response_order))
    table = lambda *args, packed_seq_params: logps  # noqa: E731
    batch = batch.with_reference(torch.zeros(len(batch.response_tokens)).double())
    output, loss_function = mp.forward_step(iter([batch]), table, loss=mp.LossConfig(**loss))
    with pytest.raises(ValueError, match=f"loss.{message}: .* parts=objectives.check"):
        loss_function(output)
