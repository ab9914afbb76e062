"""Where the values of rows belong in a step's table, and what comes out of it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from loss_tables import objective, table

from megatron_prefix.data.steps import StepColumns
from megatron_prefix.engine.table import StepTable, table_places
from megatron_prefix.objectives import ScoreParts

WORLD = SimpleNamespace(device=torch.device("cpu"), sum=lambda values: values)


def columns() -> StepColumns:
    """The columns of `loss_tables.table`."""
    inputs = table()
    names = ("num_tokens", "ranks", "labels", "desirable", "pairs", "pair_weights", "margins")
    names = (*names, "betas", "members", "set_weights")
    arrays = {name: getattr(inputs, name).numpy() for name in names}
    ids = np.stack([np.array([4, 4, 9, 9, 9, 9, 2]), np.array([0, 1, 0, 1, 2, 3, 0])], axis=1)
    return StepColumns(response_ids=ids, places={}, **arrays)


def step_table(places, **parts) -> StepTable:
    own = ScoreParts(**parts)
    denominators = {unit: float(x) for unit, x in table().denominators().items()}
    places = [table_places(columns(), *map(np.array, row), own) for row in places]
    return StepTable(columns=columns(), places=places, parts=own, denominators=denominators)


ROWS = (([2, 3, 4, 5], [1, 2, 3, 4]), ([6, 0, 1], [0]))
"""Entries and pairs of two rows."""


def untied():
    """The table with heads that differ for one response in several pairs: no two differences are
    equal, so that the sorted losses have a gradient everywhere near."""
    shares = torch.linspace(0.2, 0.7, 10, dtype=torch.float64).reshape(5, 2)
    return replace(table(), heads=shares * table().scores[table().pairs])


def row_vector(entries, pairs, **parts) -> torch.Tensor:
    inputs = untied()
    values = [inputs.scores[entries]]
    values += [inputs.heads[pairs].flatten()] if parts.get("heads") else []
    values += [inputs.alignments[entries]] if parts.get("alignments") else []
    return torch.cat(values)


@pytest.mark.parametrize(
    "parts", [{}, {"heads": True}, {"alignments": True}, {"heads": True, "alignments": True}]
)
def test_rows_make_the_table_of_the_whole_step(parts):
    own, inputs = step_table(ROWS, **parts), untied()
    gathered = own.gather([row_vector(*row, **parts) for row in ROWS], WORLD)
    scores, heads, alignments = own.parts.split(gathered, 7)
    assert torch.equal(scores, inputs.scores) and len(gathered) == own.size
    assert heads is None or torch.equal(heads, inputs.heads)
    assert alignments is None or torch.equal(alignments, inputs.alignments)


@pytest.mark.parametrize(
    "loss",
    [
        {"loss_type": "aot"},
        {"loss_type": ["aot_unpaired", "sigmoid"], "ld_alpha": 0.3},
    ],
)
def test_slopes_are_the_gradient_of_the_loss(loss):
    parts = {"heads": "ld_alpha" in loss}
    own, inputs, target = step_table(ROWS, **parts), untied(), objective(**loss)
    gathered = own.gather([row_vector(*row, **parts) for row in ROWS], WORLD)
    reference = [inputs.ref_logps] + ([inputs.ref_heads.flatten()] if parts["heads"] else [])
    result = own.loss(target, gathered, torch.cat(reference))
    assert float(result.logs["loss"]) == pytest.approx(float(target.loss(inputs)[0]), rel=1e-14)
    for place in range(own.size):
        moved = [gathered.clone() for _ in range(2)]
        moved[0][place] += 1e-5
        moved[1][place] -= 1e-5
        up, down = (float(own.loss(target, x, torch.cat(reference)).logs["loss"]) for x in moved)
        assert float(result.slopes[place]) == pytest.approx((up - down) / 2e-5, abs=1e-8)
    assert float(result.slopes.abs().max()) > 0


def test_a_reference_has_no_alignments():
    own = step_table(ROWS, heads=True, alignments=True)
    rows = [row_vector(*row, heads=True) for row in ROWS]
    gathered = own.gather(rows, WORLD)
    assert torch.equal(gathered[:7], table().scores) and not gathered[-7:].any()


def test_responses_of_values():
    own = step_table(ROWS, heads=True, alignments=True)
    chosen = np.zeros(own.size, bool)
    chosen[3] = chosen[7 + 2 * 2 + 1] = chosen[-1] = True  # head of pair (2, 4)'s rejected side
    assert own.responses(chosen) == [
        "group 2 response 0",
        "group 9 response 1",
        "group 9 response 2",
    ]


def test_places_by_hand():
    own = SimpleNamespace(num_entries=10, pairs=np.zeros((4, 2)))
    parts = ScoreParts(heads=True, alignments=True)
    places = table_places(own, np.array([7, 8]), np.array([3, 0]), parts)
    assert places.tolist() == [7, 8, 16, 17, 10, 11, 25, 26]
