"""Weights of references: by hand, replayed, and without the labels of their own step."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from megatron_prefix.reference.weights import (
    SlidingWindow,
    Thompson,
    gaps_per_token,
    pairs_of_step,
    preferred_chosen,
    validation_accuracy,
    validation_confidence,
)

STEPS = [[7, 3], [5], [2, 9], [7, 0, 1], [4, 6]]


def pairs(step: int) -> np.ndarray:
    return np.array(STEPS[step % len(STEPS)])


def judgements(seed: int = 0) -> np.ndarray:
    """Of three references over ten pairs; the later the better."""
    rng = np.random.default_rng(seed)
    return (rng.random((3, 10)) < np.array([[0.2], [0.5], [0.9]])).astype(float)


def rules(preferred: np.ndarray) -> list:
    return [SlidingWindow(preferred, pairs, 4), Thompson(preferred, pairs, seed=5)]


def test_window_by_hand():
    preferred = np.zeros((2, 10))
    preferred[0, [3, 5, 2]], preferred[1, [9, 2, 7]] = 1, (1, 0.5, 1)
    window = SlidingWindow(preferred, pairs, 4)
    assert window.weights(0).tolist() == [0.5, 0.5]  # nothing came before
    assert window.counts(3) == [3, 1.5]  # pairs 3, 5, 2, 9
    assert window.weights(3).tolist() == pytest.approx([2 / 3, 1 / 3])
    assert window.counts(1) == [1, 1]  # pairs 7, 3: all that there are
    assert SlidingWindow(0 * preferred, pairs, 4).weights(3).tolist() == [0.5, 0.5]


def test_thompson_counts_the_drawn_reference_only():
    preferred = np.array([[1.0] * 10, [0.0] * 10, [0.5] * 10])
    rule = Thompson(preferred, pairs, seed=0)
    for step in range(6):
        drawn = int(rule.weights(step).argmax())
        before, after = np.array(rule.counts(step)), np.array(rule.counts(step + 1))
        num = len(pairs(step))
        expected = {0: [num, 0], 1: [0, num], 2: [num / 2, num / 2]}[drawn]
        assert (after - before)[drawn].tolist() == expected
        assert np.delete(after - before, drawn, axis=0).tolist() == [[0, 0], [0, 0]]


def test_thompson_learns_the_best_reference():
    rule = Thompson(judgements(), pairs, seed=1)
    drawn = [int(rule.weights(step).argmax()) for step in range(200)]
    assert np.mean(np.array(drawn[100:]) == 2) > 0.8 and len(set(drawn[:20])) > 1


def test_the_seed_changes_the_draws():
    draws = [
        [int(Thompson(judgements(), pairs, seed).weights(t).argmax()) for t in range(20)]
        for seed in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("index", [0, 1])
def test_any_order_of_questions_gives_the_same_weights(index):
    """As on another rank, or in a resumed run."""
    forward = rules(judgements())[index]
    expected = [forward.weights(step).tolist() for step in range(12)]
    assert any(x != expected[0] for x in expected)
    backward = rules(judgements())[index]
    assert [backward.weights(step).tolist() for step in reversed(range(12))][::-1] == expected
    assert rules(judgements())[index].weights(11).tolist() == expected[11]


@pytest.mark.parametrize("index", [0, 1])
def test_no_label_of_a_step_is_in_its_own_weights(index):
    """The labels of a step's pairs exchanged: its weights are the same, and later ones differ."""
    for step in range(1, 5):
        seen_before = {pair for earlier in range(step) for pair in STEPS[earlier]}
        own = [pair for pair in STEPS[step] if pair not in seen_before]
        preferred = judgements()
        preferred[:, own] = 1
        exchanged = preferred.copy()
        exchanged[:, own] = 0
        one, other = rules(preferred)[index], rules(exchanged)[index]
        for early in range(step + 1):
            assert one.weights(early).tolist() == other.weights(early).tolist()
        assert one.counts(step + 1) != other.counts(step + 1)


def test_validation_by_hand():
    logps = np.array([[-4.0, -6, -1, -3], [-6, -2, -3, -3]])
    sides, num_tokens = np.array([[0, 1], [2, 3]]), np.array([2, 2, 1, 3])
    preferred = preferred_chosen(logps, sides)
    assert preferred.tolist() == [[1, 1], [0, 0.5]]
    assert validation_accuracy([preferred]).tolist() == [0.8, 0.2]
    assert validation_accuracy([preferred[:, :1], preferred[:, 1:]]).tolist() == [0.8, 0.2]
    gaps = gaps_per_token(logps, sides, num_tokens)
    assert gaps.tolist() == [[-2 + 3, -1 + 1], [-3 + 1, -3 + 1]]
    assert validation_confidence([gaps]).tolist() == [1, 0]
    assert validation_confidence([-np.abs(gaps)]).tolist() == [0.5, 0.5]


def test_pairs_of_a_plan():
    data = SimpleNamespace(group_pairs=np.array([0, 1, 3]))
    composition = SimpleNamespace(groups=lambda step: np.array([[1, 0, 1], []][step], np.int64))
    sampler = SimpleNamespace(dataset=data, composition=composition)
    assert pairs_of_step(sampler, 0).tolist() == [1, 2, 0, 1, 2]
    assert pairs_of_step(sampler, 1).tolist() == []
