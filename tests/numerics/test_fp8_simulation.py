"""What sharing and packing change in FP8, simulated on CPU (fp8_simulation.py).

Blocks of 128 channels of one token do not know of other tokens, so `blockwise` gives every response
the same log-probability in every row. One scale for a whole tensor depends on the row's largest
value, so with `tensorwise` and `delayed` it depends on what else is in the row, within the rounding
of FP8. A weight's gradient is a sum over tokens in quantised blocks of them, so it always does.
"""

from __future__ import annotations

import pytest
import torch
from fp8_simulation import E4M3, Recipe, in_fp8, quantised
from small_models import EXACT, chain, outcome, pack, random_model

RECIPES = ("blockwise", "tensorwise", "delayed")
SIZES = {"num_layers": 2, "hidden_size": 192, "ffn_hidden_size": 320, "init_method_std": 0.05}
ROUNDING = 2.0**-4
"""Of e4m3; the budgets of runs in FP8 (train/rounding.py) take it."""


@pytest.fixture(scope="module")
def results(world, forest):
    """{recipe: outcomes of the same trees: alone, in two rows, in one, and in one with padding}."""
    trees, paths = forest
    rows = {
        "alone": [chain(path.tokens, path.loss_start) for path in paths],
        "two rows": [pack(trees[:2]), pack(trees[2:])],
        "one row": [pack(trees)],
        "padded": [pack(trees, 128)],
    }
    every = {}
    for recipe in RECIPES:
        for name, batches in rows.items():
            model = random_model(world, **SIZES)
            with in_fp8(model, recipe):
                outcome(model, batches)  # `delayed` has no history at first
                every[recipe, name] = outcome(model, batches)
    model = random_model(world, **SIZES)
    every["bfloat16", "alone"] = outcome(model, rows["alone"])
    return every


@pytest.mark.parametrize("layout", ["two rows", "one row", "padded"])
def test_blockwise_log_probabilities_do_not_depend_on_the_row(results, layout):
    logps, gradients = results["blockwise", layout].errors(results["blockwise", "alone"])
    assert logps < EXACT
    assert EXACT < gradients < 8 * ROUNDING  # blocks of other tokens, and sums quantised once


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
def test_one_scale_for_a_row_depends_on_the_row_within_rounding(results, recipe):
    logps, gradients = results[recipe, "one row"].errors(results[recipe, "alone"])
    assert EXACT < logps < ROUNDING
    assert EXACT < gradients < 8 * ROUNDING
    again, _ = results[recipe, "one row"].errors(results[recipe, "two rows"])
    assert again > EXACT


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_further_from_exact_than_from_itself_in_another_row(results, recipe):
    """The quantisation itself changes more than the layout of rows does."""
    exact = results["bfloat16", "alone"]
    quantised_error, _ = results[recipe, "alone"].errors(exact)
    layout_error, _ = results[recipe, "one row"].errors(results[recipe, "alone"])
    assert layout_error < 4 * quantised_error
    print(
        recipe,
        {
            x: results[recipe, x].errors(results[recipe, "alone"])
            for x in ("two rows", "one row", "padded")
        },
        "from exact",
        quantised_error,
    )


def test_blocks_have_scales_of_their_own():
    x = torch.ones(2, 256, dtype=torch.float64) * 0.3
    x[0, 0] = 4480.0  # its block loses 0.3, the others keep it
    whole, blocks = (Recipe(name)("x", x)[0] for name in ("tensorwise", "blockwise"))
    assert abs(blocks[1, 5] - 0.3) < 0.3 * ROUNDING and blocks[0, 200] == blocks[1, 5]
    assert abs(whole[1, 5] - 0.3) > 0.01 * 0.3
    assert quantised(torch.tensor([500.0]), torch.tensor(1.0), E4M3) == 448
