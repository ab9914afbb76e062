"""TRL's `DPOTrainer` and `RewardTrainer` as judges: the same losses, gradient norms and weights,
step by step.

A random Hugging Face Llama in float32, 64 pairs, 8 steps of 8 pairs: the pairs of one epoch, in
the order of our step plan. Ours are shared trees packed into rows, TRL's are separate sequences.
`tools/compare_trl.py` holds what runs both.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))

from compare_trl import run_ours, run_trl  # noqa: E402
from trl_common import (  # noqa: E402
    Outcome,
    Setting,
    farthest_weight,
    has_trl,
    make_model,
    relative,
    text_pairs,
    with_margins,
)

pytestmark = [
    pytest.mark.sample,
    pytest.mark.skipif(not has_trl(), reason="TRL 1.16 is not installed: pip install trl"),
    pytest.mark.filterwarnings("ignore"),
]
NUM_PAIRS = 64
TOLERANCE = 1e-4
"""Relative for losses and gradient norms, absolute for weights."""
SETTINGS = {
    "plain": Setting(),
    "label smoothing": Setting(label_smoothing=0.1),
    "precomputed reference": Setting(precomputed=True),
    "ipo": Setting(loss_type="ipo"),
    "robust": Setting(loss_type="robust", label_smoothing=0.1),
    "mixed": Setting(
        loss_type=("sigmoid", "bco_pair", "sft"), loss_weights=(0.8, 0.2, 1.0), lr=3e-5
    ),
    "simpo": Setting(loss_type="simpo", beta=2.0, lr=3e-4),
    "cpo": Setting(loss_type="cpo", label_smoothing=0.1),
    "orpo": Setting(loss_type="orpo", beta=1.0),
}
FIRST = {"sigmoid": math.log(2), "ipo": 25.0, "robust": math.log(2)}
"""Loss of the first step; the others depend on the model."""

REWARD = Setting(kind="reward", lr=3e-4)
REWARDS = {
    "plain": REWARD,
    "margin": replace(REWARD, margin=True),
    "centring": replace(REWARD, center=0.1),
    "margin and centring": replace(REWARD, margin=True, center=0.01),
}


def assert_same_run(ours: Outcome, theirs: Outcome) -> None:
    """The same tokens, and every step and weight within tolerance."""
    assert ours.num_tokens == theirs.num_tokens
    assert len(ours.losses) == len(theirs.losses)
    assert max(relative(ours.losses, theirs.losses)) < TOLERANCE, (ours.losses, theirs.losses)
    assert max(relative(ours.grad_norms, theirs.grad_norms)) < TOLERANCE, (
        ours.grad_norms,
        theirs.grad_norms,
    )
    assert farthest_weight(ours, theirs) < TOLERANCE


def assert_it_learns(ours: Outcome, setting: Setting) -> None:
    """An equality of runs that go nowhere would say nothing."""
    first = FIRST.get(setting.loss_type, ours.losses[0])
    assert len(ours.losses) == 8 and abs(ours.losses[0] - first) < 1e-5 * max(1, first)
    assert max(abs(loss - first) for loss in ours.losses) > 0.03
    assert max(ours.grad_norms) > 1.0, "clipping is never at work"
    assert sum(ours.num_run) < 0.9 * sum(ours.num_tokens), "nothing is shared"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
    return make_model(tmp_path_factory.mktemp("model"), **sizes, initializer_range=0.12)


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """Our run of some pairs under a setting, each trained once: (outcome, pairs in their order)."""
    known: dict[str, list] = {}

    @cache
    def ours(name: str, setting: Setting):
        return run_ours(known[name], model, setting, tmp_path_factory.mktemp("ours") / "run")

    def start(name: str, pairs: list, setting: Setting):
        known.setdefault(name, pairs)
        return ours(name, setting)

    return start


@pytest.fixture(scope="module")
def made_pairs() -> list[dict[str, str]]:
    """Random letters, other ones in chosen than in rejected; some are two tokens in UTF-8."""
    rng = np.random.default_rng(5)

    def text(letters: str, low: int, high: int) -> str:
        return "".join(rng.choice([*letters], rng.integers(low, high)))

    def pair() -> dict[str, str]:
        return {
            "prompt": "Say: " + text("abcdefgh éß\n", 30, 90) + ".",
            "chosen": " yes " + text("abcé", 5, 30),
            "rejected": " yes " + text("efgß", 5, 30),
        }

    return [pair() for _ in range(NUM_PAIRS)]


@pytest.mark.parametrize("name", SETTINGS)
def test_real_pairs_train_as_in_trl(name, data_dir, model, run, tmp_path):
    pairs = text_pairs(data_dir / "hh_pairs.jsonl.gz", model, NUM_PAIRS, 250)
    ours, taken = run("hh", pairs, SETTINGS[name])
    assert_it_learns(ours, SETTINGS[name])
    assert taken != pairs and sorted(map(str, taken)) == sorted(map(str, pairs))
    assert_same_run(ours, run_trl(taken, model, SETTINGS[name], tmp_path))


@pytest.mark.parametrize("name", SETTINGS)
def test_made_pairs_train_as_in_trl(name, made_pairs, model, run, tmp_path):
    ours, taken = run("made", made_pairs, SETTINGS[name])
    assert_it_learns(ours, SETTINGS[name])
    assert_same_run(ours, run_trl(taken, model, SETTINGS[name], tmp_path))


def _swapped(pairs: list[dict[str, str]], place: int) -> list[dict[str, str]]:
    pair = pairs[place]
    other = {**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]}
    return [*pairs[:place], other, *pairs[place + 1 :]]


@pytest.mark.parametrize(
    ("change", "pairs_change"),
    [
        ({"beta": 0.1002}, None),
        ({"label_smoothing": 0.001}, None),
        ({"clip_grad": 1000.0}, None),
        ({}, lambda pairs: _swapped(pairs, 20)),
        ({}, lambda pairs: [*pairs[1:], pairs[0]]),
    ],
    ids=["beta", "smoothing", "clipping", "a pair swapped", "another order"],
)
def test_a_different_run_is_detected(change, pairs_change, made_pairs, model, run, tmp_path):
    """So the comparison can fail."""
    ours, taken = run("made", made_pairs, SETTINGS["plain"])
    pairs = pairs_change(taken) if pairs_change else taken
    theirs = run_trl(pairs, model, replace(SETTINGS["plain"], steps=4, **change), tmp_path)
    ours = replace(
        ours,
        losses=ours.losses[:4],
        grad_norms=ours.grad_norms[:4],
        num_tokens=theirs.num_tokens,
        weights=theirs.weights,
    )
    with pytest.raises(AssertionError):
        assert_same_run(ours, theirs)


@pytest.mark.parametrize(("name", "beta"), [("simpo", 2.004), ("orpo", 1.002)])
def test_a_different_run_without_a_reference_is_detected(
    name, beta, made_pairs, model, run, tmp_path
):
    ours, taken = run("made", made_pairs, SETTINGS[name])
    theirs = run_trl(taken, model, replace(SETTINGS[name], beta=beta), tmp_path)
    with pytest.raises(AssertionError):
        assert_same_run(ours, theirs)


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory) -> Path:
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
    folder = tmp_path_factory.mktemp("reward")
    return make_model(folder, "reward", **sizes, initializer_range=0.12)


@pytest.fixture(scope="module")
def hh_pairs(data_dir, reward_model) -> list[dict]:
    pairs = text_pairs(data_dir / "hh_pairs.jsonl.gz", reward_model, NUM_PAIRS, 250)
    return with_margins(pairs)


@pytest.fixture(scope="module")
def reward_run(reward_model, hh_pairs, tmp_path_factory):
    """Our reward model under a setting, each trained once: (outcome, pairs in their order)."""

    @cache
    def ours(setting: Setting):
        return run_ours(hh_pairs, reward_model, setting, tmp_path_factory.mktemp("ours") / "run")

    return ours


def without_margins(pairs: list[dict], setting: Setting) -> list[dict]:
    """The pairs without margins, unless the setting uses them: TRL uses every margin it finds."""
    if setting.margin:
        return pairs
    return [{key: x for key, x in pair.items() if key != "margin"} for pair in pairs]


@pytest.mark.parametrize("name", REWARDS)
def test_a_reward_model_trains_as_in_trl(name, reward_model, hh_pairs, reward_run, tmp_path):
    setting = REWARDS[name]
    ours, taken = reward_run(setting)
    assert taken != hh_pairs and sorted(map(str, taken)) == sorted(map(str, hh_pairs))
    assert len(ours.losses) == 8 and max(ours.losses) - min(ours.losses) > 0.1
    assert max(ours.grad_norms) > 1.0, "clipping is never at work"
    assert sum(ours.num_run) < 0.9 * sum(ours.num_tokens), "nothing is shared"
    assert "score.weight" in ours.weights
    pairs = without_margins(taken, setting)
    assert_same_run(ours, run_trl(pairs, reward_model, setting, tmp_path))


@pytest.mark.parametrize("change", [{"center": 0.101}, {"margin": True}], ids=["c", "margin"])
def test_a_different_reward_model_is_detected(change, reward_model, reward_run, tmp_path):
    """So the comparison can fail."""
    ours, taken = reward_run(REWARDS["centring"])
    setting = replace(REWARDS["centring"], steps=2, **change)
    theirs = run_trl(without_margins(taken, setting), reward_model, setting, tmp_path)
    ours = replace(
        ours,
        losses=ours.losses[:2],
        grad_norms=ours.grad_norms[:2],
        num_tokens=theirs.num_tokens,
        weights=theirs.weights,
    )
    with pytest.raises(AssertionError):
        assert_same_run(ours, theirs)
