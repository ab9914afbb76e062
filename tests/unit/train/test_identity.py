"""The identity of a run has what decides its data, its rewards and its loss."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from tiny_models import tiny_config

from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.errors import InputError
from megatron_prefix.objectives import check
from megatron_prefix.testing import write_random_set
from megatron_prefix.train.identity import run_identity, run_schedule
from megatron_prefix.train.setup import prepare_trainer


@pytest.fixture
def identity(tmp_path):
    dataset = SimpleNamespace(fingerprint="ab")

    def identity(fingerprint: str | None = "cd", loss: dict | None = None, **data) -> dict:
        config = tiny_config("set", tmp_path, data=data, loss=loss or {})
        return run_identity(config, check(config.loss, "lm"), dataset, fingerprint)

    return identity


def test_the_data_of_a_run(identity):
    plain = identity()
    assert plain["data.train fingerprint"] == "ab"
    assert plain["reference model fingerprint"] == "cd"
    assert identity(None)["reference model fingerprint"] is None
    assert identity(sharing="pair") == plain, "rows do not decide which groups share a step"
    assert identity(seed=7) != plain and identity(sort_by_length=True) != plain
    rows = {"global_batch_size": None, "rows_per_step": 2}
    assert identity(**rows) != identity(**rows, sharing="pair"), "here they do"
    assert identity(**rows) != identity(**rows, packing_method="best-fit")
    assert identity(**rows) != identity(**rows, oversized="split")
    assert identity(oversized="split") == plain


def test_the_loss_of_a_run(identity):
    plain = identity()
    assert identity(loss={"beta": 0.1, "loss_type": "sigmoid", "weighting": "pair"}) == plain
    assert identity(loss={"reference": "precomputed", "ref_logps": "file"}) == plain, "same values"
    changes = [
        *({"beta": 0.5}, {"label_smoothing": 0.1}, {"weighting": "group"}, {"loss_type": "ipo"}),
        *({"ld_alpha": 0.5}, {"use_weighting": True}, {"comparisons": "adjacent"}),
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    ]
    others = [identity(loss=change) for change in changes]
    assert all(other != plain for other in others)
    assert others[0]["loss.beta"] == 0.5


def saved(world, prefix: str, folder) -> dict:
    """Sections of a run that has saved its first step."""
    train = {"steps": 3, "save": str(folder / "saved"), "load": str(folder / "saved")}
    trainer = prepare_trainer(
        tiny_config(prefix, folder / "run", train=train), PreferenceDataset(prefix), None, world
    )
    trainer.train_step()
    trainer.save()
    trainer.close()
    return {"train": train}


def test_a_run_goes_on_with_its_own_loss_only(world, tmp_path):
    prefix = write_random_set(tmp_path / "set", 0, 8)
    sections = saved(world, prefix, tmp_path)
    config = tiny_config(prefix, tmp_path / "run", **sections, loss={"beta": 0.5})
    with pytest.raises(InputError, match=r"loss.beta: 0.1 in the checkpoint, 0.5 now\); resume"):
        prepare_trainer(config, PreferenceDataset(prefix), None, world)


def test_a_changed_schedule_is_told_with_both_values(world, tmp_path, capsys):
    prefix = write_random_set(tmp_path / "set", 0, 8)
    sections = saved(world, prefix, tmp_path)
    sections["train"]["steps"] = 5
    config = tiny_config(prefix, tmp_path / "run", **sections, optimizer={"lr": 1e-4})
    prepare_trainer(config, PreferenceDataset(prefix), None, world).close()
    printed = capsys.readouterr().out
    assert "after step 1; optimizer.lr: 0.001 in the checkpoint, 0.0001 now; " in printed
    assert "steps of the run: 3 in the checkpoint, 5 now\n" in printed


def test_the_schedule_has_every_setting_of_the_optimizer(tmp_path):
    schedule = run_schedule(tiny_config("set", tmp_path), 7)
    assert schedule["steps of the run"] == 7 and schedule["optimizer.clip_grad"] == 1.0
