"""What is watched beside the loss, by hand and against numpy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from loss_tables import objective, table

from megatron_prefix.objectives.objective import Objective
from megatron_prefix.objectives.watching import with_correlation


def means_of(own: Objective, inputs) -> dict[str, float]:
    sums = own.loss(inputs)[1]
    return own.logged({name: (float(x[0]), float(x[1])) for name, x in sums.items()})


def test_log_ratios_and_kl():
    inputs = table()
    means = means_of(objective(), inputs)
    ratios = (inputs.scores - inputs.ref_logps)[inputs.pairs]
    assert means["logratios/chosen"] == pytest.approx(float(ratios[:, 0].mean()))
    assert means["logratios/rejected"] == pytest.approx(float(ratios[:, 1].mean()))
    assert means["kl"] == means["logratios/mean"] == pytest.approx(float(ratios.mean()))
    assert means["rewards/chosen"] == pytest.approx(0.1 * means["logratios/chosen"])


def test_kto_has_a_kl_of_its_own():
    """z, of mismatches; the mean log-ratio has the same name as with every objective."""
    inputs = replace(table(), kl=torch.tensor(0.75, dtype=torch.float64))
    means = means_of(objective(loss_type="kto"), inputs)
    assert means["kl"] == 0.75
    assert means["logratios/mean"] == means_of(objective(), inputs)["logratios/mean"]


@pytest.mark.parametrize(
    ("kind", "loss"),
    [
        ("lm", {}),
        ("lm", {"loss_type": ["ipo", "sft"], "ld_alpha": 0.5}),
        ("lm", {"loss_type": "aot"}),
    ]
    + [
        ("reward", {"loss_type": "bradley_terry"}),
        ("lm", {"loss_type": "simpo"}),
        ("reward", {"loss_type": "regression"}),
    ],
)
def test_the_correlation_is_that_of_numpy(kind, loss):
    own, inputs = objective(kind, **loss), table(heads=table().scores[table().pairs] / 2)
    inputs = replace(inputs, ref_heads=inputs.ref_logps[inputs.pairs] / 2)
    (_, outputs), *_ = own._outputs(replace(inputs, tail_weight=own.ld_alpha))
    rewards = np.concatenate([outputs.metrics[f"rewards/{x}"] for x in ("chosen", "rejected")])
    lengths = inputs.num_tokens[inputs.pairs.T].flatten()
    expected = np.corrcoef(lengths, rewards)[0, 1]
    assert abs(expected) < 0.99
    means = means_of(own, inputs)
    assert means["rewards/length_correlation"] == pytest.approx(expected, rel=1e-9)
    assert not any(name.startswith("moments/") for name in means)
    assert ("kl" in means) == (kind == "lm" and own.reference != "none")


@pytest.mark.parametrize("scores", [table().ref_logps, table().ref_logps + 1e-12])
def test_equal_rewards_have_no_correlation(scores):
    """The first step of a run, exact and to rounding."""
    means = means_of(objective(), table(scores=scores))
    assert "rewards/length_correlation" not in means and abs(means["kl"]) < 1e-11


def test_equal_lengths_have_no_correlation():
    inputs = replace(table(), num_tokens=torch.full_like(table().num_tokens, 9))
    assert "rewards/length_correlation" not in means_of(objective(), inputs)


def test_a_correlation_by_hand():
    """Lengths 2 and 4, rewards 0.5 and 0.1."""
    moments = {"length": 3.0, "reward": 0.3, "length^2": 10.0, "reward^2": 0.13}
    moments["length reward"] = 0.7
    means = with_correlation({f"moments/{name}": x for name, x in moments.items()} | {"kl": 2.0})
    assert means == {"kl": 2.0, "rewards/length_correlation": pytest.approx(-1.0)}
