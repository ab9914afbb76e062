"""A loss section is checked against the registry."""

import math
import subprocess
import sys
from dataclasses import fields

import pytest
from loss_tables import objective, outputs, table

from megatron_prefix.config import LossConfig
from megatron_prefix.errors import InputError
from megatron_prefix.objectives import check
from megatron_prefix.objectives.reference_checks import KEYS
from megatron_prefix.objectives.registry import OBJECTIVES

SETTINGS = ("loss_type", "loss_weights", "weighting", "reference", "ref_logps", "comparisons")
SETTINGS += ("references", *KEYS, "attribute")
GIVEN = {
    "desirable_weight": 2.0,
    "undesirable_weight": 2.0,
    "beta": 0.2,
    "label_smoothing": 0.1,
    "f_divergence_type": "js_divergence",
    "f_alpha_divergence_coef": 0.25,
    "dpop_lambda": 5.0,
    "ld_alpha": 0.5,
    "use_weighting": True,
    "discopop_tau": 0.1,
    "reward_scale": 2.0,
    "sft_average": "response",
    "cpo_alpha": 0.5,
    "simpo_gamma": 1.0,
    "alpha": 0.25,
    "temperature": 0.5,
    "margin": True,
    "pair_beta": True,
    "center_rewards_coefficient": 0.1,
}
"""A value for every option that is not its default."""


def options_of(name: str) -> set[str]:
    record = OBJECTIVES[name]
    added = OBJECTIVES[record.adds.name].options if record.adds else {}
    return {*record.options, *added}


def users(option: str) -> str:
    """The objectives that take an option, as an error lists them."""
    return ", ".join(sorted(name for name in OBJECTIVES if option in options_of(name)))


def test_every_option_of_the_schema_belongs_to_an_objective():
    options = {field.name for field in fields(LossConfig)} - set(SETTINGS)
    assert options == set(GIVEN) == {x for name in OBJECTIVES for x in options_of(name)}


@pytest.mark.parametrize("option", GIVEN)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_option_is_used_or_refused(name, option):
    """Used: it changes the loss. Refused: the message names those that take it."""
    given = {option: GIVEN[option]}
    if option == "f_alpha_divergence_coef":
        given["f_divergence_type"] = "alpha_divergence"
    if option not in options_of(name):
        with pytest.raises(InputError, match=f"loss.{option} = .*, only {users(option)}: remove"):
            check(LossConfig(loss_type=name, **given))
        return
    others = {key: x for key, x in given.items() if key != option}
    plain, changed = (
        float(objective(loss_type=name, **x).loss(table())[0]) for x in (others, given)
    )
    assert abs(plain - changed) > 1e-6


def test_first_values():
    assert objective().first_value == math.log(2)
    assert objective(loss_type="ipo").first_value == pytest.approx(25.0)
    assert objective(loss_type="ipo", beta=0.5).first_value == pytest.approx(1.0)
    assert objective(loss_type="bradley_terry").first_value is None
    assert objective(margin=True).first_value is None
    assert objective(reference="none").first_value is None
    mpo = {"loss_type": ["sigmoid", "bco_pair", "hinge"], "loss_weights": [0.8, 0.2, 1.0]}
    assert objective(**mpo).first_value == pytest.approx(1.2 * math.log(2) + 1.0)
    assert objective(loss_type=["sigmoid", "simpo"]).has_first_value
    assert not objective(loss_type=["infonca", "lipo_lambda"]).has_first_value
    assert not objective(loss_type="simpo").has_first_value
    assert objective(**mpo).first_formula == "0.8 (ln 2) + 0.2 (2 ln 2) + 1"


def test_what_is_not_given_has_the_record_s_default():
    own = objective()
    assert own.options == {
        **{"beta": 0.1, "label_smoothing": 0.0, "margin": False, "dpop_lambda": None},
        **{"f_divergence_type": "reverse_kl", "ld_alpha": None, "use_weighting": False},
        "pair_beta": False,
    }
    assert (own.reference, own.weighting) == ("model", "pair")
    reward = objective("reward", loss_type="bradley_terry")
    assert (reward.reference, reward.options["margin"]) == ("none", False)
    assert objective(label_smoothing=0.2).options["label_smoothing"] == 0.2


def test_options_that_members_have_of_their_own_are_not_written_out():
    """Two defaults of one option cannot be one value of a file."""
    own = objective(loss_type=["sigmoid", "exo_pair"])
    assert [m.options["label_smoothing"] for m in own.members] == [0.0, 0.001]
    assert "label_smoothing" not in own.options and own.options["beta"] == 0.1


@pytest.mark.parametrize("loss_type", ["sigmoid", "bradley_terry"])
def test_margins_are_a_column_only_if_switched_on(loss_type):
    without, own = (objective(loss_type=loss_type, margin=x) for x in (False, True))
    assert "margins" not in without.columns and "margins" in own.columns
    plain, moved = (outputs(table(), loss_type=loss_type, margin=x).losses for x in (False, True))
    assert (moved - plain)[2] == 0 and (moved - plain)[0] > 0


def test_a_reference_that_is_missing():
    with pytest.raises(ValueError, match="TrainBatch.with_reference"):
        objective().loss(table(ref_logps=None))


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "ipo"])
def test_without_a_reference_its_log_probabilities_are_0(name):
    import torch

    own = objective(loss_type=name, reference="none")
    assert not any(column.startswith("ref_") for column in own.columns)
    zeros = table(ref_logps=torch.zeros(7, dtype=torch.float64))
    expected, _ = objective(loss_type=name).loss(zeros)
    assert float(own.loss(table(ref_logps=None))[0]) == float(expected)


@pytest.mark.parametrize(
    ("loss", "kind", "message"),
    [
        ({"loss_type": "sigmoyd"}, "lm", "loss_type = 'sigmoyd': unknown .did you mean sigmoid"),
        ({"loss_type": "x"}, "lm", f"known: {', '.join(sorted(OBJECTIVES))}.$"),
        ({"loss_type": "aot_pair"}, "lm", "unknown .here it is aot_unpaired"),
        ({"loss_type": "cdpo"}, "lm", "unknown .here it is sigmoid with label_smoothing"),
        ({"reference": "none", "loss_type": "robust"}, "lm", "robust compares with a reference"),
        ({"loss_type": "bradley_terry"}, "lm", "needs model.kind: reward, and model.kind is lm"),
        ({"loss_type": "sigmoid"}, "reward", "needs model.kind: lm.*takes .*bradley_terry"),
        ({"loss_type": "sigmoid"}, "reward", "takes .*plackett_luce"),
        (
            {"loss_type": "plackett_luce", "beta": 0.1},
            "reward",
            "loss.beta = 0.1: loss.loss_type: plackett_luce does not use it",
        ),
        ({"loss_type": "bradley_terry", "reference": "model"}, "reward", "has no reference"),
        ({"loss_type": "cpo", "reference": "model"}, "lm", "cpo, for a language model, has no ref"),
        ({"loss_type": "sft", "reference": "precomputed"}, "lm", "has no reference"),
        ({"loss_type": "exo_pair", "label_smoothing": 0.0}, "lm", "with exo_pair it must be above"),
        (
            {"f_alpha_divergence_coef": 0.5, "f_divergence_type": "js_divergence"},
            "lm",
            "f_alpha_divergence_coef = 0.5: has no effect with loss.f_divergence_type = js_div",
        ),
        ({"f_alpha_divergence_coef": 0.5}, "lm", "has no effect with loss.f_divergence_type = No"),
        (
            {"loss_type": ["sigmoid", "bco_pair"], "f_divergence_type": "forward_kl"},
            "lm",
            "f_divergence_type = forward_kl: bco_pair of loss.loss_type does not use it",
        ),
        (
            {"use_weighting": True, "loss_type": ["sigmoid", "sft"]},
            "lm",
            "use_weighting = True: sft of loss.loss_type does not use it",
        ),
        ({"ld_alpha": 0.5, "reference": "none"}, "lm", "ld_alpha = 0.5 with loss.reference: none"),
        ({"ld_alpha": 0.5, "loss_type": ["sigmoid", "simpo"]}, "lm", "simpo of loss.loss_type do"),
        ({"loss_type": ["sigmoid", "hinge", "sigmoid"]}, "lm", "sigmoid is in the list twice"),
        ({"loss_weights": [1.0]}, "lm", "loss_type = sigmoid is not a list"),
        (
            {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]},
            "lm",
            "1 weights for the 2 loss types sigmoid, sft",
        ),
        (
            {"loss_type": ["sigmoid", "nca"]},
            "lm",
            r"cannot mix units: sigmoid \(per pair\), nca \(per set\)",
        ),
        (
            {"loss_type": ["bradley_terry", "regression"]},
            "reward",
            r"bradley_terry \(per pair\), regression \(per response\)",
        ),
        ({"loss_type": "infonca", "weighting": "group"}, "lm", "weighting = group: infonca has on"),
        ({"loss_type": "nca", "comparisons": "all"}, "lm", "comparisons = all: nca has one loss"),
    ],
)
def test_what_is_refused(loss, kind, message):
    with pytest.raises(InputError, match=message):
        check(LossConfig(**loss), kind)


@pytest.mark.parametrize(
    "loss",
    [
        {"loss_type": ["sigmoid", "sft"], "f_divergence_type": "forward_kl"},
        {"loss_type": ["sigmoid", "bco_pair"], "f_divergence_type": "reverse_kl"},
        {"loss_type": ["infonca", "sft"]},
        {"loss_type": ["sigmoid", "sft"], "ld_alpha": 0.5},
        {"ld_alpha": 0.5, "reference": "precomputed", "ref_logps": "file"},
        {"loss_type": ["simpo", "sft"]},
        {"loss_type": "cpo", "cpo_alpha": 0.0},
    ],
)
def test_what_is_allowed(loss):
    check(LossConfig(**loss), "lm")


def test_every_fault_is_named_at_once():
    with pytest.raises(InputError, match="margin = True.*reference = none"):
        check(LossConfig(loss_type="robust", margin=True, reference="none"))


def test_a_loss_section_is_checked_without_torch():
    code = (
        "import sys; from megatron_prefix.config import LossConfig; "
        "from megatron_prefix.objectives import check; check(LossConfig()); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
