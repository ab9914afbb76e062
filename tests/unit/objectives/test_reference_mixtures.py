"""Mixtures of references: by hand, against their formulas, gradients, and refused options."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from loss_tables import float64, objective, split, table

from megatron_prefix.config import LossConfig
from megatron_prefix.config.loss import ReferenceFile
from megatron_prefix.errors import InputError
from megatron_prefix.objectives import LossInputs, Objective, ReferenceColumns, check
from megatron_prefix.objectives.reference_mixtures import (
    adaptive_weights,
    clip_around_anchor,
    geometric_mixture,
    harmonic_mixture,
)

BETA = 0.3
ANCHOR = 1
WEIGHTS = float64([0.125, 0.25, 0.625])


def files(*names: str) -> tuple[ReferenceFile, ...]:
    return tuple(ReferenceFile(name=name, ref_logps=name) for name in names)


def mixed(**loss) -> Objective:
    return objective(references=files("a", "b", "c"), **{"beta": BETA, **loss})


def several(
    weights: torch.Tensor | None = WEIGHTS, *, heads: bool = False, scores=None
) -> LossInputs:
    """A table with three references."""
    generator = torch.Generator().manual_seed(3)
    logps = -20 * torch.rand(3, 7, generator=generator, dtype=torch.float64)
    inputs = table() if scores is None else table(scores=scores)
    columns = ReferenceColumns(
        logps=logps,
        weights=weights,
        anchor=ANCHOR,
        heads=0.4 * logps[:, inputs.pairs] if heads else None,
    )
    return replace(
        inputs,
        ref_logps=logps[ANCHOR],
        ref_heads=None if columns.heads is None else columns.heads[ANCHOR],
        references=columns,
    )


def loss_and_gradient(objective: Objective, **options) -> tuple[torch.Tensor, torch.Tensor]:
    scores = table().scores.clone().requires_grad_()
    loss, _ = objective.loss(several(scores=scores, **options))
    return loss.detach(), torch.autograd.grad(loss, scores)[0]


def by_formula(kind: str, *, is_adaptive: bool, is_split: bool = True):
    """DPO with the mixture as the paper writes it: probabilities, and one loop over references."""
    inputs = several(scores=table().scores.clone().requires_grad_())
    total = weight_total = 0.0
    for pair, weight in zip(inputs.pairs, inputs.pair_weights, strict=True):
        chosen, rejected = inputs.references.logps[:, pair].T
        gaps = (chosen - rejected).abs()
        shares = gaps / gaps.sum() if is_adaptive else WEIGHTS
        d = BETA * (inputs.scores[pair[0]] - inputs.scores[pair[1]])
        if kind == "multi_dpo":
            values = [torch.log1p(torch.exp(BETA * a - d)) for a in chosen - rejected]
            loss = sum(w * value for w, value in zip(shares, values, strict=True))
        else:
            sizes = [abs(side.mean()) for side in (chosen, rejected)]
            references = []
            for side, size in zip((chosen, rejected), sizes, strict=True):
                eta = 0.1 * size / sum(sizes) if is_split else 0.1
                bounds = side[ANCHOR] * (1 + eta), side[ANCHOR] * (1 - eta)
                if kind == "harmonic":
                    clipped = [min(max(x, bounds[0]), bounds[1]) for x in side]
                    parts = [w / torch.exp(x) for w, x in zip(shares, clipped, strict=True)]
                    references.append(torch.log(1 / sum(parts)))
                else:
                    references.append(sum(w * x for w, x in zip(shares, side, strict=True)))
            loss = torch.log1p(torch.exp(BETA * (references[0] - references[1]) - d))
        total = total + weight * loss
        weight_total += weight
    loss = total / weight_total
    return loss.detach(), torch.autograd.grad(loss, inputs.scores)[0]


@pytest.mark.parametrize("rule", ["given", "adaptive"])
@pytest.mark.parametrize("kind", ["multi_dpo", "geometric", "harmonic", "harmonic whole"])
def test_the_formulas(kind, rule):
    kind, _, whole = kind.partition(" ")
    options = {"reference_weights": "adaptive"} if rule == "adaptive" else {}
    if whole:
        options["reference_clip_split"] = False
    weights = None if rule == "adaptive" else WEIGHTS
    loss, gradient = loss_and_gradient(mixed(reference_mixture=kind, **options), weights=weights)
    expected = by_formula(kind, is_adaptive=rule == "adaptive", is_split=not whole)
    assert float(loss) == pytest.approx(float(expected[0]), abs=1e-12)
    torch.testing.assert_close(gradient, expected[1], rtol=0, atol=1e-12)


def test_mixtures_by_hand():
    logps = float64([0.5, 0.25]).log()[:, None]
    weights = float64([[0.5], [0.5]])
    assert harmonic_mixture(logps, weights).exp() == pytest.approx(1 / 3)  # 1 / (1 + 2)
    assert geometric_mixture(logps, weights).exp() == pytest.approx(0.125**0.5)
    alone = float64([[0.0], [1.0]])
    assert harmonic_mixture(logps, alone).exp() == pytest.approx(0.25)
    assert geometric_mixture(logps, alone).exp() == pytest.approx(0.25)


def test_the_clip_by_hand():
    chosen, rejected = float64([[-10.0], [-30.0]]), float64([[-20.0], [-4.0]])
    # means -20 and -12: 0.1 is divided into 0.0625 and 0.0375; the anchor is -10 and -20
    clipped = clip_around_anchor(chosen, rejected, 0, 0.1, True)
    assert clipped[0].flatten().tolist() == pytest.approx([-10, -10.625])
    assert clipped[1].flatten().tolist() == pytest.approx([-20, -19.25])
    clipped = clip_around_anchor(chosen, rejected, 0, 0.1, False)
    assert clipped[0].flatten().tolist() == pytest.approx([-10, -11])
    assert clipped[1].flatten().tolist() == pytest.approx([-20, -18])


def test_adaptive_weights_by_hand():
    chosen, rejected = float64([[-1.0, -2], [-5, -2]]), float64([[-4.0, -2], [-4, -2]])
    assert adaptive_weights(chosen, rejected).T.tolist() == [[0.75, 0.25], [0.5, 0.5]]


@pytest.mark.parametrize("kind", ["multi_dpo", "geometric", "harmonic"])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "bco_pair", "plackett_luce"])
def test_equal_references_are_one(kind, loss_type):
    inputs = table()
    columns = ReferenceColumns(
        logps=inputs.ref_logps.expand(3, -1), weights=WEIGHTS, anchor=2, heads=None
    )
    options = {"reference_clip_split": False} if kind == "harmonic" else {}
    ours = mixed(loss_type=loss_type, reference_mixture=kind, **options)
    loss, sums = ours.loss(replace(inputs, references=columns))
    expected, one = objective(loss_type=loss_type, beta=BETA).loss(inputs)
    assert float(loss) == pytest.approx(float(expected), abs=1e-12)
    for name, values in one.items():
        torch.testing.assert_close(sums[name], values)


@pytest.mark.parametrize("kind", ["multi_dpo", "geometric", "harmonic"])
@pytest.mark.parametrize("index", [0, 2])
def test_all_weight_on_one_reference(kind, index):
    weights = torch.zeros(3, dtype=torch.float64)
    weights[index] = 1
    options = {"reference_clip": 1000.0} if kind == "harmonic" else {}
    inputs = several(weights)
    loss, sums = mixed(reference_mixture=kind, **options).loss(inputs)
    one = replace(inputs, ref_logps=inputs.references.logps[index], references=None)
    expected, values = objective(beta=BETA).loss(one)
    assert float(loss) == pytest.approx(float(expected), abs=1e-12)
    torch.testing.assert_close(sums["rewards/margins"], values["rewards/margins"])


@pytest.mark.parametrize("kind", ["multi_dpo", "geometric", "harmonic"])
@pytest.mark.parametrize("rule", ["adaptive", "thompson"])
def test_gradients_and_parts(kind, rule):
    """The loss of a table is the sum of those of its parts, and its gradient is right."""
    ours = mixed(
        loss_type=["sigmoid", "sft"],
        reference_mixture=kind,
        reference_weights=rule,
        ld_alpha=0.5,
    )
    weights = None if rule == "adaptive" else WEIGHTS
    inputs = several(weights, heads=True)
    whole, sums = ours.loss(inputs)
    parts = []
    for part in split(replace(inputs, references=None)):
        responses = [inputs.ref_logps.tolist().index(x) for x in part.ref_logps.tolist()]
        pairs = [inputs.margins.tolist().index(x) for x in part.margins.tolist()]
        columns = replace(
            inputs.references,
            logps=inputs.references.logps[:, responses],
            heads=inputs.references.heads[:, pairs],
        )
        parts.append(ours.loss(replace(part, references=columns), inputs.denominators()))
    assert sum(float(loss) for loss, _ in parts) == pytest.approx(float(whole), abs=1e-12)
    for name in sums:
        torch.testing.assert_close(sum(own[name] for _, own in parts), sums[name])
    scores = inputs.scores.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ours.loss(replace(inputs, scores=x))[0], scores)


def test_metrics():
    _, sums = mixed(reference_weights=[1.0, 2.0, 5.0]).loss(several())
    means = {name: float(total / count) for name, (total, count) in sums.items()}
    assert [means[f"reference_weights/{x}"] for x in "abc"] == WEIGHTS.tolist()
    logps, pairs = several().references.logps, several().pairs
    for name, own in zip("abc", logps, strict=True):
        share = (own[pairs[:, 0]] > own[pairs[:, 1]]).double().mean()
        assert means[f"reference_accuracies/{name}"] == pytest.approx(float(share))


def test_multi_dpo_rewards_are_weighted_means():
    inputs = several()
    _, sums = mixed(loss_type="ipo", reference_mixture="multi_dpo").loss(inputs)
    expected = 0.0
    for weight, logps in zip(WEIGHTS, inputs.references.logps, strict=True):
        one = replace(inputs, ref_logps=logps, references=None)
        expected += weight * objective(loss_type="ipo", beta=BETA).loss(one)[1]["rewards/margins"]
    torch.testing.assert_close(sums["rewards/margins"][0], expected[0])


def test_the_start_is_the_anchor():
    ours, inputs = mixed(reference_mixture="harmonic"), several()
    value, slopes = ours.start(inputs, None)
    at_anchor, _ = ours.loss(replace(inputs, scores=inputs.ref_logps))
    assert float(value) == pytest.approx(float(at_anchor), abs=1e-12)
    assert ours.first_value is None and ours.has_first_value
    assert (slopes > 0).tolist() == [True] * 6 + [False]  # the last response is in no pair


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"reference": "model"}, "loss.reference = model with loss.references"),
        ({"reference": "none"}, "loss.reference = none with loss.references"),
        ({"loss_type": "simpo"}, "loss.loss_type: simpo has no reference"),
        ({"loss_type": "sft"}, "loss.loss_type: sft has no reference"),
        ({"reference_weights": [1.0, 2.0]}, "2 weights for the 3 references a, b, c"),
        ({"reference_weights": [0.0, 0.0, 0.0]}, "they sum to 0"),
        ({"reference_anchor": "d"}, "is none of the references a, b, c"),
        ({"reference_clip": 0.2}, "no effect with loss.reference_mixture: multi_dpo"),
        (
            {"reference_clip_split": False, "reference_mixture": "geometric"},
            "no effect with loss.reference_mixture: geometric",
        ),
        ({"reference_window": 9}, "no effect with loss.reference_weights: uniform"),
        (
            {"loss_type": "plackett_luce", "reference_weights": "adaptive"},
            "plackett_luce has one loss per set",
        ),
        (
            {"loss_type": "nca", "reference_mixture": "harmonic"},
            "set loss.reference_clip_split: false",
        ),
        (
            {"loss_type": "aot", "reference_weights": "adaptive"},
            "aot has none of its own for a pair",
        ),
        ({"loss_type": "kto"}, "kto has one loss per response and takes one reference"),
        ({"loss_type": "bco", "reference_mixture": "geometric"}, "bco has one loss per response"),
        ({"loss_type": "apo_zero_unpaired"}, "apo_zero_unpaired has one loss per response"),
        ({"references": files("a", "a")}, "two are named a"),
        ({"references": None, "reference_clip": 0.2}, "no effect without loss.references"),
        ({"references": None, "reference_weights": "uniform"}, "no effect without loss.references"),
    ],
)
def test_refused(loss, message):
    with pytest.raises(InputError, match=message):
        check(LossConfig(**{"references": files("a", "b", "c"), **loss}), "lm")


def test_a_reward_model_has_no_references():
    loss = LossConfig(loss_type="bradley_terry", references=files("a"))
    with pytest.raises(InputError, match="bradley_terry has no reference"):
        check(loss, "reward")


def test_a_table_without_references_is_refused():
    with pytest.raises(ValueError, match="TrainBatch.with_several_references"):
        mixed().loss(table())
    with pytest.raises(ValueError, match="pass the step's weights"):
        mixed().loss(several(None))
