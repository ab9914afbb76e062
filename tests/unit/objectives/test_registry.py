"""The registry: every record is whole; a loss section is checked against it."""

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from megatron_prefix.config import LossConfig
from megatron_prefix.errors import InputError
from megatron_prefix.objectives import LossInputs, LossOutputs, check
from megatron_prefix.objectives.record import ObjectiveRecord, Option
from megatron_prefix.objectives.registry import OBJECTIVES

PAIRS = 3


def users(option: str) -> str:
    """The objectives that take an option, as an error lists them."""
    return ", ".join(sorted(x.name for x in OBJECTIVES.values() if option in x.options))


def inputs(ref_is_policy: bool = False) -> LossInputs:
    """Three pairs over five responses."""
    generator = torch.Generator().manual_seed(0)
    scores, ref = (-20 * torch.rand(5, generator=generator, dtype=torch.float64) for _ in range(2))
    return LossInputs(
        scores=scores,
        ref_logps=scores if ref_is_policy else ref,
        num_tokens=torch.tensor([1, 4, 2, 9, 3]),
        pairs=torch.tensor([[0, 1], [2, 3], [2, 4]]),
        margins=torch.tensor([0.5, 1.0, 0.0], dtype=torch.float64),
    )


@pytest.mark.parametrize("name", OBJECTIVES)
class TestEveryRecord:
    def test_names_columns_and_options_that_exist(self, name):
        record = OBJECTIVES[name]
        assert all(hasattr(inputs(), column) for column in record.columns)
        assert set(record.options) <= set(LossConfig.__dataclass_fields__)
        assert record.function.__doc__ and "arXiv" in record.function.__doc__

    def test_gives_a_loss_and_metrics_for_every_pair(self, name):
        objective = check(LossConfig(loss_type=name))
        outputs = objective.outputs(inputs())
        assert outputs.losses.shape == (PAIRS,) and outputs.losses.dtype == torch.float64
        assert all(x.shape == (PAIRS,) for x in outputs.metrics.values())

    def test_starts_at_its_first_value(self, name):
        objective = check(LossConfig(loss_type=name))
        if objective.record.first is None:
            return
        losses = objective.outputs(inputs(ref_is_policy=True)).losses
        assert losses.tolist() == pytest.approx([objective.first_value] * PAIRS, rel=1e-14)

    def test_is_no_steeper_there_than_it_says(self, name):
        """Move the rewards of each pair apart, and together."""
        objective = check(LossConfig(loss_type=name))
        if objective.record.first is None:
            return
        start = inputs(ref_is_policy=True)
        for sign in (1.0, -1.0):
            step = 1e-6 / objective.rewards_per_nat
            shift = step * torch.tensor([1.0, sign, 1.0, sign, sign], dtype=torch.float64)
            moved = replace(start, scores=start.scores + shift)
            change = (objective.outputs(moved).losses - objective.first_value).abs().max()
            assert change <= 1e-6 * objective.first_steepness * 1.0001


def test_first_values():
    assert check(LossConfig()).first_value == math.log(2)
    assert check(LossConfig(loss_type="ipo")).first_value == pytest.approx(25.0)
    assert check(LossConfig(loss_type="ipo", beta=0.5)).first_value == pytest.approx(1.0)
    assert check(LossConfig(loss_type="bradley_terry")).first_value is None


def test_what_is_not_given_has_the_record_s_default():
    objective = check(LossConfig())
    assert objective.options == {"beta": 0.1, "label_smoothing": 0.0}
    assert (objective.reference, objective.weighting) == ("model", "pair")
    reward = check(LossConfig(loss_type="bradley_terry"), "reward")
    assert (reward.reference, reward.options["margin"]) == ("none", False)
    assert check(LossConfig(label_smoothing=0.2)).options["label_smoothing"] == 0.2


def test_margins_are_a_column_only_if_switched_on():
    without = check(LossConfig(loss_type="bradley_terry", margin=False))
    objective = check(LossConfig(loss_type="bradley_terry", margin=True))
    assert "margins" not in without.columns and "margins" in objective.columns
    plain, moved = (x.outputs(inputs()).losses for x in (without, objective))
    assert (moved - plain)[2] == 0 and (moved - plain)[0] > 0


def test_a_reference_that_is_missing():
    with pytest.raises(ValueError, match="TrainBatch.with_reference"):
        check(LossConfig()).outputs(replace(inputs(), ref_logps=None))


@pytest.mark.parametrize(
    ("loss", "kind", "message"),
    [
        ({"loss_type": "sigmoyd"}, "lm", "loss_type = 'sigmoyd': unknown .did you mean sigmoid"),
        ({"loss_type": "x"}, "lm", f"known: {', '.join(sorted(OBJECTIVES))}.$"),
        (
            {"loss_type": "ipo", "label_smoothing": 0.1},
            "lm",
            f"label_smoothing = 0.1: .*ipo does not use it, only {users('label_smoothing')}:",
        ),
        ({"margin": True}, "lm", f"loss.margin = True: .*does not use it, only {users('margin')}:"),
        ({"center_rewards_coefficient": 0.01}, "lm", "center_rewards_coefficient = 0.01: "),
        ({"reference": "none"}, "lm", "loss.reference = none: .*sigmoid compares with a reference"),
        ({"loss_type": "bradley_terry"}, "lm", "needs model.kind: reward, and model.kind is lm"),
        ({"loss_type": "sigmoid"}, "reward", "needs model.kind: lm.*takes .*bradley_terry"),
        (
            {"loss_type": "bradley_terry", "beta": 0.1},
            "reward",
            f"beta = 0.1: .*does not use it, only {users('beta')}: remove",
        ),
        ({"loss_type": "bradley_terry", "reference": "model"}, "reward", "has no reference"),
    ],
)
def test_what_is_refused(loss, kind, message):
    with pytest.raises(InputError, match=message):
        check(LossConfig(**loss), kind)


def test_every_fault_is_named_at_once():
    with pytest.raises(InputError, match="margin = True.*reference = none"):
        check(LossConfig(loss_type="ipo", margin=True, reference="none"))


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_rewards_are_what_the_record_declares_per_nat(name):
    """A nat more of each log-ratio moves every reward by that much."""
    options = {"beta": 0.3} if "beta" in OBJECTIVES[name].options else {}
    objective, start = check(LossConfig(loss_type=name, **options)), inputs()
    moved = replace(start, scores=start.scores + 1.0)
    before, after = (objective.outputs(x).metrics["rewards/chosen"] for x in (start, moved))
    assert (after - before).tolist() == pytest.approx([objective.rewards_per_nat] * PAIRS)


def test_rewards_per_nat_do_not_depend_on_the_name_of_an_option():
    record = replace(OBJECTIVES["sigmoid"], name="other", rewards_per_nat=None)
    loss, records = LossConfig(loss_type="other", beta=0.3), {**OBJECTIVES, "other": record}
    assert check(loss, "lm", records).rewards_per_nat == 1.0
    declared = replace(record, rewards_per_nat=lambda beta, label_smoothing: 2 * beta)
    assert check(loss, "lm", {**records, "other": declared}).rewards_per_nat == 0.6


def test_an_objective_is_a_record_and_nothing_else():
    """A new one, whose option is narrower than the schema's and which logs another name."""

    def squares(chosen_logps, rejected_logps, *, beta):
        losses = beta * (chosen_logps - rejected_logps - 1).square()
        return LossOutputs(losses=losses, metrics={"gap": chosen_logps - rejected_logps})

    record = ObjectiveRecord(
        name="squares",
        function=squares,
        columns=("chosen_logps", "rejected_logps"),
        options={"beta": Option(default=2.0, is_allowed=lambda x: x > 1, allowed="above 1")},
        model="lm",
    )
    records = {**OBJECTIVES, "squares": record}
    objective = check(LossConfig(loss_type="squares"), "lm", records)
    assert objective.reference == "none" and objective.first_value is None
    outputs = objective.outputs(inputs())
    assert set(outputs.metrics) == {"gap"}
    assert set(objective.logp_metrics(inputs())) == {"logps/chosen", "logps/rejected"}
    with pytest.raises(InputError, match="loss.beta = 0.5: with squares it must be above 1"):
        check(LossConfig(loss_type="squares", beta=0.5), "lm", records)


def test_a_loss_section_is_checked_without_torch():
    code = (
        "import sys; from megatron_prefix.config.schema import LossConfig; "
        "from megatron_prefix.objectives import check; check(LossConfig()); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
