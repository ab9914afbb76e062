"""Who owns which tokens of a row: equal parts, every token once, balanced if that pays."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_prefix.attention.context_parallel import ownership
from megatron_prefix.attention.pieces import needed_tokens
from megatron_prefix.layout import TreeLayout
from megatron_prefix.testing import random_forest, visibility_by_walking

COST = ownership.ContextCost.of_layer(
    hidden_size=4096, ffn_hidden_size=14336, num_heads=32, num_groups=8, head_dim=128, key_bytes=8
)
LONG = TreeLayout.from_parents([16384, *[1024] * 4], [-1, 0, 0, 0, 0])


def padded(layout: TreeLayout, size: int) -> TreeLayout:
    missing = -layout.num_tokens % size
    return TreeLayout.concat(
        [layout, TreeLayout.from_parents([missing], [-1])] if missing else [layout]
    )


def modelled(layout: TreeLayout, rows: list[np.ndarray]) -> np.ndarray:
    """Seconds of each rank: what tree_aware balances, counted row by row."""
    area = np.array([ownership.area_of(layout, own) for own in rows])
    received = np.array([len(needed_tokens(layout, own)) - len(own) for own in rows])
    tokens = layout.num_tokens / len(rows)
    return COST.per_token * tokens + COST.per_entry * area + COST.per_key * received


RULES = {
    "contiguous": ownership.contiguous,
    "area": ownership.greedy_by_area,
    "tree": lambda layout, size: ownership.tree_aware(layout, size, COST),
}


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("rule", RULES)
def test_every_token_has_one_owner_and_every_rank_as_many(rule, size):
    rng = np.random.default_rng(size)
    for num_trees in (1, 2, 5, 40):
        layout = padded(random_forest(rng, num_trees), size)
        rows = RULES[rule](layout, size)
        assert [len(own) for own in rows] == [layout.num_tokens // size] * size
        assert np.array_equal(np.sort(np.concatenate(rows)), np.arange(layout.num_tokens))
        assert all((np.diff(own) > 0).all() for own in rows)


def test_needed_tokens_are_the_visible_ones():
    rng = np.random.default_rng(0)
    for _ in range(50):
        layout = random_forest(rng)
        visible = visibility_by_walking(layout.lengths, layout.parents)
        own = np.flatnonzero(rng.random(layout.num_tokens) < rng.choice([0.05, 0.5]))
        assert np.array_equal(needed_tokens(layout, own), np.flatnonzero(visible[own].any(axis=0)))


def test_chunks_know_what_they_need():
    """The counts that swaps are judged by are those of needed_tokens."""
    rng = np.random.default_rng(1)
    for size, window in ((2, None), (4, None), (2, 3), (4, 9)):
        layout = padded(random_forest(rng, 30), size)
        chunks = ownership._Chunks.cut(layout, size, {window: 1.0})
        for chunk, (start, stop) in enumerate(zip(chunks.starts, chunks.stops, strict=True)):
            needed = needed_tokens(layout, np.arange(start, stop), window)
            among = np.searchsorted(chunks.stops, needed, side="right")
            expected = np.bincount(among, minlength=len(chunks.starts))
            assert np.array_equal(chunks.needs[chunk], expected)
            own = np.arange(start, stop)
            assert chunks.area[chunk] == ownership.area_of(layout, own, window)


def test_the_area_of_windows_is_balanced():
    """A chain whose layers all have a window: every token sees as many keys, and nothing is
    swapped, although the whole paths of later tokens are longer."""
    layout = TreeLayout.from_parents([32768], [-1])
    whole = ownership.tree_aware(layout, 4, COST)
    assert not all((np.diff(own) == 1).all() for own in whole)
    windows = {1024: 1.0}
    for own in ownership.tree_aware(layout, 4, replace(COST, windows=windows)):
        assert (np.diff(own) == 1).all()
    mixed = ownership.ContextCost.of_model(
        SimpleNamespace(
            num_layers=4,
            window_size=(1023, 0),
            window_attn_skip_freq=[1, 0, 1, 1],
            hidden_size=64,
            ffn_hidden_size=96,
            num_moe_experts=None,
            num_attention_heads=4,
            num_query_groups=2,
            kv_channels=16,
            params_dtype=torch.bfloat16,
        )
    )
    assert mixed.windows == {1024: 0.75, None: 0.25}


@pytest.mark.parametrize("size", [2, 4, 8])
def test_long_trees_are_balanced_with_fewer_keys_than_by_area_alone(size):
    layout = padded(TreeLayout.concat([LONG, LONG]), size)
    before = modelled(layout, ownership.contiguous(layout, size))
    rows = ownership.tree_aware(layout, size, COST)
    after = modelled(layout, rows)
    assert after.max() / after.mean() <= max(1.03, before.max() / before.mean() - 0.1)
    assert after.max() < before.max() or before.max() <= 1.01 * before.mean()
    by_area = ownership.greedy_by_area(layout, size)
    keys = [sum(len(needed_tokens(layout, x)) for x in ranks) for ranks in (rows, by_area)]
    assert keys[0] < keys[1] or size == 2  # a tree each


def test_short_pairs_stay_contiguous():
    pair = TreeLayout.from_parents([60, 30, 30], [-1, 0, 0])
    layout = TreeLayout.concat([pair] * 64)
    rows = ownership.tree_aware(layout, 4, COST)
    assert all(
        np.array_equal(a, b) for a, b in zip(rows, ownership.contiguous(layout, 4), strict=True)
    )


def test_the_same_on_every_rank():
    layout = padded(TreeLayout.concat([LONG]), 4)
    first, second = (ownership.tree_aware(layout, 4, COST) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
