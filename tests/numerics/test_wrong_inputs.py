"""What a careless packing would feed the model has to break its equality, and by far.

Each wrong row below has one thing wrong, made from the right row by hand. The same comparison
holds to 1e-12 for the right rows (test_model.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_models import CPU, VARIANTS, outcome, pack, random_model

from megatron_prefix.attention.megatron import TreePackedSeqParams
from megatron_prefix.attention.plan import TreePlan
from megatron_prefix.data.steps.collate import MicroBatch
from megatron_prefix.data.tree import PrefixTree
from megatron_prefix.engine.batch import TrainBatch, to_device
from megatron_prefix.layout import TreeLayout

WRONG = 1e-2
"""What a wrong input has to exceed, relative to the largest entry."""
PARAMS = ("plan", "position_ids", "logit_tokens", "logit_of_target", "target_tokens")


def with_params(batch: TrainBatch, **changes) -> TrainBatch:
    old = {name: getattr(batch.params, name) for name in PARAMS}
    return replace(batch, params=TreePackedSeqParams(**{**old, **changes}))


def leaky_mask(trees: Sequence[PrefixTree]) -> TrainBatch:
    """Every tree one chain, so that siblings see those before them; positions stay right."""
    sizes = [tree.num_tokens for tree in trees]
    layout = TreeLayout.from_parents(sizes, [-1] * len(sizes))
    return with_params(to_device(pack(trees), CPU), plan=TreePlan(layout, CPU))


def leaky_row(trees: Sequence[PrefixTree]) -> TrainBatch:
    """Trees are right, but see the trees before them in the row."""
    row = pack(trees).layout
    lengths, parents = row.lengths.tolist(), row.parents.tolist()
    first = 0
    for tree in trees[:-1]:
        root = first + tree.num_nodes
        parents[root] = first if parents[root] == -1 else parents[root]
        first = root
    layout = TreeLayout.from_parents(lengths, parents)
    return with_params(to_device(pack(trees), CPU), plan=TreePlan(layout, CPU))


def row_index_as_position(trees: Sequence[PrefixTree]) -> TrainBatch:
    batch = to_device(pack(trees), CPU)
    return with_params(batch, position_ids=torch.arange(batch.tokens.size(1)))


def retargeted(row: MicroBatch, logit_token: np.ndarray) -> TrainBatch:
    order = np.argsort(logit_token, kind="stable")
    return to_device(
        replace(
            row,
            logit_token=logit_token[order],
            target_token=row.target_token[order],
            response=row.response[order],
        ),
        CPU,
    )


def labels_off_by_one(trees: Sequence[PrefixTree]) -> TrainBatch:
    """Rows that see the token they predict."""
    row = pack(trees)
    return retargeted(row, np.minimum(row.logit_token + 1, len(row.tokens) - 1))


def shifted_label_row(trees: Sequence[PrefixTree]) -> TrainBatch:
    """A label row shifted by one: a sibling's first token is predicted by the row before it,
    which is the last one of another response, instead of by the branch."""
    row = pack(trees)
    position = row.layout.position_ids()
    logit_token = row.logit_token.copy()
    for i, (source, token) in enumerate(zip(logit_token, row.target_token, strict=True)):
        later = np.flatnonzero(
            (position == position[source] + 1)
            & (row.tokens == token)
            & (np.arange(len(position)) > source)
            & (np.arange(len(position)) < row.layout.token_subtree_ends()[source])
        )
        logit_token[i] = later[0] - 1
    return retargeted(row, logit_token)


def shared_token_counted_once(trees: Sequence[PrefixTree]) -> TrainBatch:
    """A token that several responses share enters the sum of one of them only."""
    row = pack(trees)
    keys = np.stack([row.logit_token, row.target_token], 1)
    first = np.sort(np.unique(keys, axis=0, return_index=True)[1])
    assert len(first) < len(keys)
    kept = {name: getattr(row, name)[first] for name in ("logit_token", "target_token", "response")}
    return to_device(replace(row, **kept), CPU)


@pytest.mark.parametrize("backend", ["dense", "path"])
@pytest.mark.parametrize(
    "wrong",
    [
        leaky_mask,
        leaky_row,
        row_index_as_position,
        labels_off_by_one,
        shifted_label_row,
        shared_token_counted_once,
    ],
)
def test_wrong_inputs_are_seen(world, forest, alone, wrong, backend):
    model = random_model(world, attention_backend=backend, **VARIANTS["untied"])
    logps, gradients = outcome(model, [wrong(forest[0])]).errors(alone("untied"))
    assert logps > WRONG and gradients > WRONG, (logps, gradients)
