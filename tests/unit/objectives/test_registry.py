"""The registry: every record is whole; objectives of the user's own code."""

import sys
from dataclasses import replace

import pytest
import torch
from loss_tables import objective, split, table

from megatron_prefix.config import LossConfig
from megatron_prefix.errors import InputError
from megatron_prefix.objectives import LossOutputs, check, register_objective
from megatron_prefix.objectives.record import ObjectiveRecord, Option
from megatron_prefix.objectives.registry import OBJECTIVES

KINDS = [
    *((name, record.model) for name, record in OBJECTIVES.items()),
    *((name, "reward") for name, record in OBJECTIVES.items() if record.reward_variant),
]
SIZES = {"label": 7, "pair": 5, "token": 5, "set": 3, "response": 7}


@pytest.mark.parametrize(("name", "kind"), KINDS)
class TestEveryRecord:
    def test_names_columns_and_options_that_exist(self, name, kind):
        record = OBJECTIVES[name].variant(kind)
        assert record.model == kind
        assert all(hasattr(table(), column) for column in record.columns)
        assert set(record.options) <= set(LossConfig.__dataclass_fields__)
        assert record.function.__doc__ and "arXiv" in record.function.__doc__

    def test_gives_a_loss_for_every_unit_and_metrics(self, name, kind):
        for member in objective(kind, loss_type=name).members:
            outputs = member.outputs(table())
            assert outputs.losses.shape == (SIZES[member.unit],)
            assert outputs.losses.dtype == torch.float64 and outputs.losses.isfinite().all()
            assert all(x.shape == (SIZES["pair"],) for x in outputs.metrics.values())
            assert all(x.shape == (SIZES["set"],) for x in outputs.set_metrics.values())
            every = [*outputs.metrics.values(), *outputs.set_metrics.values()]
            assert not any(x.requires_grad for x in every)

    def test_starts_at_its_first_value(self, name, kind):
        own = objective(kind, loss_type=name)
        if own.first_value is None:
            return
        loss, _ = own.loss(table(ref_is_policy=True))
        assert float(loss) == pytest.approx(own.first_value, rel=1e-14)

    def test_the_slopes_of_the_start_bound_the_loss(self, name, kind):
        """Move the log-probabilities of the responses apart, and together."""
        own = objective(kind, loss_type=name)
        if own.reference == "none":
            return
        start = table(ref_is_policy=True)
        value, slopes = own.start(start, None)
        assert float(value) == float(own.loss(start)[0]) and slopes.shape == (7,)
        for seed in range(4):
            signs = torch.randn(7, generator=torch.Generator().manual_seed(seed)).sign().double()
            moved = replace(start, scores=start.scores + 1e-6 * signs)
            if own.has_first_value:
                change = abs(float(own.loss(moved)[0] - value))
                assert change <= 1e-6 * float(slopes.sum()) * 1.001

    def test_a_table_is_the_sum_of_its_sets(self, name, kind):
        """Loss, gradient and metrics of a step do not depend on how it is split into rows."""
        own = objective(kind, loss_type=name)
        if own.needs_step:
            return
        whole = table(scores=table().scores.requires_grad_())
        loss, sums = own.loss(whole)
        (gradient,) = torch.autograd.grad(loss, whole.scores)
        denominators = {unit: float(x) for unit, x in whole.denominators().items()}
        parts = [own.loss(part, denominators) for part in split(whole)]
        total = sum(part for part, _ in parts)
        assert float(total) == pytest.approx(float(loss), rel=1e-12)
        (other,) = torch.autograd.grad(total, whole.scores)
        assert torch.allclose(other, gradient, rtol=1e-12, atol=1e-14)
        assert all(part.keys() == sums.keys() for _, part in parts)
        for metric, value in sums.items():
            added = sum(part[metric] for _, part in parts)
            if metric == "kl" and own.needs_mismatches:  # z of the step, which every row has
                added = added / added[1]
            assert torch.allclose(added, value, rtol=1e-12, atol=1e-12), metric

    def test_what_needs_the_whole_step_is_not_such_a_sum(self, name, kind):
        """Its record must not claim to be of scope `set`, nor the other way round."""
        own = objective(kind, loss_type=name)
        denominators = {unit: float(x) for unit, x in table().denominators().items()}
        parts = [own.advanced(part) for part in split(table())]
        total = sum(float(own.loss(part, denominators)[0]) for part in parts)
        is_sum = abs(total - float(own.loss(own.advanced(table()))[0])) < 1e-9
        assert is_sum != own.needs_step

    def test_a_wrong_denominator_is_found(self, name, kind):
        """So the test above can fail: dividing each part by its own denominator is another loss."""
        own = objective(kind, loss_type=name)
        loss, _ = own.loss(table())
        alone = sum(float(own.loss(part)[0]) for part in split(table())[:2])
        assert abs(alone - float(loss)) > 1e-6

    def test_gradients(self, name, kind):
        own = objective(kind, loss_type=name)
        scores = table().scores.requires_grad_()
        assert torch.autograd.gradcheck(lambda x: own.loss(table(scores=x))[0], [scores])

    def test_an_empty_table(self, name, kind):
        own = objective(kind, loss_type=name)
        empty = table(scores=table().scores.requires_grad_())
        nothing = torch.zeros(0, dtype=torch.int64)
        empty = replace(split(empty)[2], pairs=nothing.reshape(0, 2))
        whole = {unit: float(x) for unit, x in table().denominators().items()}
        unlabelled = replace(empty, labels=torch.full_like(empty.labels, torch.nan))
        loss, sums = own.loss(unlabelled, whole)
        assert float(loss) == 0.0 and loss.requires_grad
        assert all(x.isfinite().all() for x in sums.values())


def test_the_slopes_of_the_start_see_a_corner():
    """DPOP's penalty begins where the policy is the reference."""
    own = objective(dpop_lambda=50.0)
    start = table(ref_is_policy=True)
    value, slopes = own.start(start, None)
    moved = replace(start, scores=start.scores - 1e-6)
    change = abs(float(own.loss(moved)[0] - value))
    assert 1e-6 < change <= 1e-6 * float(slopes.sum()) * 1.001
    plain, _ = objective().start(start, None)
    assert float(value) == float(plain)


def test_a_new_objective_is_a_record_and_nothing_else():
    """One whose option is narrower than the schema's and which logs another name."""

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
    own = check(LossConfig(loss_type="squares"), "lm", records)
    assert own.reference == "none" and own.first_value is None
    _, sums = own.loss(table())
    assert set(sums) == {"gap", "logps/chosen", "logps/rejected"}
    with pytest.raises(InputError, match="loss.beta = 0.5: with squares it must be above 1"):
        check(LossConfig(loss_type="squares", beta=0.5), "lm", records)


MODULE = """
from megatron_prefix import LossOutputs, ObjectiveRecord, Option

def half(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta):
    gap = chosen_logps - ref_chosen_logps - rejected_logps + ref_rejected_logps
    return LossOutputs(losses=beta * (gap - 1).abs() / 2)

COLUMNS = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
RECORD = ObjectiveRecord(
    name="half", function=half, columns=COLUMNS, options={"beta": Option(default=0.5)}, model="lm"
)
OTHER = ObjectiveRecord(
    name="other", function=half, columns=("tokens",), options={}, model="lm"
)
NUMBER = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module of the user's on the Python path."""
    (tmp_path / "own_losses.py").write_text(MODULE)
    (tmp_path / "broken_losses.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_losses"
    sys.modules.pop("own_losses", None)


def test_an_objective_by_its_place(module):
    own = check(LossConfig(loss_type=f"{module}:RECORD"), "lm")
    assert (own.reference, own.options) == ("model", {"beta": 0.5})
    both = check(LossConfig(loss_type=["sigmoid", f"{module}:RECORD"], beta=0.25))
    parts = [x.outputs(table()).losses for x in both.members]
    weights = table().pair_weights
    expected = sum((weights * x).sum() / weights.sum() for x in parts)
    assert float(both.loss(table())[0]) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("no_such_module:RECORD", "cannot be imported .ModuleNotFoundError"),
        ("own_losses:NOTHING", "cannot be imported .AttributeError"),
        ("broken_losses:RECORD", "cannot be imported .ZeroDivisionError"),
        ("own_losses:NUMBER", "is a int, not an ObjectiveRecord"),
        ("own_losses:OTHER", r"reads columns that no table has: \['tokens'\]"),
        ("own_losses.py:RECORD", "cannot be imported"),
        ("/tmp/own_losses:RECORD", "unknown"),
        ("own_losses:RECORD()", "unknown"),
    ],
)
def test_a_place_that_has_no_objective(module, place, message):
    with pytest.raises(InputError, match=message):
        check(LossConfig(loss_type=place))


def test_registered_objectives(monkeypatch):
    monkeypatch.setattr("megatron_prefix.objectives.registry.OBJECTIVES", dict(OBJECTIVES))
    from megatron_prefix.objectives.registry import OBJECTIVES as known

    record = replace(OBJECTIVES["hinge"], name="mine")
    assert register_objective(record) is record and register_objective(record) is record
    assert check(LossConfig(loss_type="mine"), "lm", known).first_value == 1.0
    with pytest.raises(ValueError, match="'hinge' is registered already"):
        register_objective(replace(record, name="hinge"))
    with pytest.raises(ValueError, match="options that the loss section does not have"):
        register_objective(replace(record, name="new", options={"gamma": Option()}))
