"""The optimizer's state comes back; its settings are those of the configuration."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_config

from megatron_prefix.checkpoint.optimizer_state import _place_steps
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.engine import optimizer as optimizer_module
from megatron_prefix.testing import write_random_set
from megatron_prefix.train.setup import prepare_trainer


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> str:
    return write_random_set(tmp_path_factory.mktemp("optimizer") / "set", 0, 8)


def prepared(
    world, prefix: str, folder: Path, is_distributed: bool, lr: float, dtype: str = "float32"
):
    """A run that resumes from `folder`, if a checkpoint is there."""
    config = tiny_config(
        prefix,
        folder / "run",
        model={"dtype": dtype},
        parallel={"use_distributed_optimizer": is_distributed},
        optimizer={"lr": lr, "weight_decay": 0.1},
        train={"steps": 3, "save": str(folder), "load": str(folder)},
    )
    return prepare_trainer(config, PreferenceDataset(prefix), None, world)


def moments(trainer) -> list[dict[str, torch.Tensor]]:
    """The state of every parameter, in the order of the parameters."""
    optimizer = trainer.policy.optimizer
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    states = []
    for part in parts:
        for group in part.optimizer.param_groups:
            states += [part.optimizer.state[parameter] for parameter in group["params"]]
    return states


@pytest.mark.parametrize("is_distributed", [False, True])
def test_the_state_comes_back_with_the_new_settings(world, prefix, tmp_path, is_distributed):
    first = prepared(world, prefix, tmp_path, is_distributed, lr=1e-3)
    first.train_step()
    first.train_step()
    first.save()
    first.close()
    second = prepared(world, prefix, tmp_path, is_distributed, lr=1e-4)
    second.close()
    assert second.step == 2
    saved, loaded = moments(first), moments(second)
    assert len(saved) == len(loaded) > 0
    for ours, theirs in zip(loaded, saved, strict=True):
        assert ours["exp_avg_sq"].any() and float(ours["step"]) == float(theirs["step"]) == 2
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(ours[name], theirs[name])
    steps = [state["step"] for state in loaded]
    assert len({id(step) for step in steps}) == len(steps), "one tensor would be counted up often"
    rates = {group["lr"] for group in second.policy.optimizer.param_groups}
    assert rates == {1e-4}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("is_distributed", [False, True])
def test_a_run_goes_on_under_the_other_optimizer(world, prefix, tmp_path, is_distributed, dtype):
    """Steps 2 and 3 of a run that resumes under the other kind of optimizer are those of one that
    keeps its own."""
    first = prepared(world, prefix, tmp_path, is_distributed, lr=1e-3, dtype=dtype)
    first.train_step()
    first.save()
    rest = [first.train_step() for _ in range(2)]
    first.close()
    second = prepared(world, prefix, tmp_path, not is_distributed, lr=1e-3, dtype=dtype)
    assert second.step == 1
    for expected in rest:
        values = second.train_step()
        assert values["loss"] == expected["loss"] and values["grad_norm"] == expected["grad_norm"]
    second.close()


def test_step_counts_go_to_where_a_fused_adam_reads_them():
    """Torch's fused Adam has them on the parameter's device, the other one on the host."""
    parameters = [torch.nn.Parameter(torch.zeros(2, device="meta")) for _ in range(3)]
    state = {p: {"step": torch.tensor(7.0, dtype=torch.float64)} for p in parameters[:2]}
    groups = [
        {"params": [parameters[0], parameters[2]], "fused": True},  # the last has no state yet
        {"params": [parameters[1]], "fused": None},
    ]
    _place_steps(SimpleNamespace(param_groups=groups, optimizer=SimpleNamespace(state=state)))
    moved, other = (state[p]["step"] for p in parameters[:2])
    assert (moved.device.type, moved.dtype) == ("meta", torch.float32)
    assert (other.device.type, float(other)) == ("cpu", 7.0)


@pytest.mark.parametrize("is_distributed", [False, True])
def test_a_run_goes_on_under_the_fused_adam(world, prefix, tmp_path, monkeypatch, is_distributed):
    """As a checkpoint of a CPU is resumed on CUDA; the fused Adam also runs here."""
    first = prepared(world, prefix, tmp_path, is_distributed, lr=1e-3)
    first.train_step()
    first.save()
    rest = [first.train_step() for _ in range(2)]
    first.close()

    def fuse(optimizer, chunk):
        for group in optimizer.param_groups:
            group["fused"] = True

    monkeypatch.setattr(optimizer_module, "fuse_adam", fuse)
    second = prepared(world, prefix, tmp_path, is_distributed, lr=1e-3)
    assert second.step == 1
    assert all(group["fused"] for group in second.policy.optimizer.param_groups)
    for expected in rest:
        values = second.train_step()
        assert values["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert values["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    assert all(float(state["step"]) == 3 for state in moments(second))
    second.close()
