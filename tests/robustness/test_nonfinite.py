"""A loss or a gradient that is not finite stops the run, is named, and can be replayed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from commands import command, lines, write_config

from megatron_prefix.checkpoint.save_load import RunCheckpoints, load_weights
from megatron_prefix.config import Config, load_config
from megatron_prefix.data.steps.collate import MicroBatch
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.distributed.world import join_world
from megatron_prefix.engine.batch import to_device
from megatron_prefix.engine.optimizer import build_model
from megatron_prefix.engine.step import run_schedule
from megatron_prefix.layout import TreeLayout
from megatron_prefix.objectives import check
from megatron_prefix.train.non_finite import finite_rows
from megatron_prefix.train.setup import prepare_trainer
from megatron_prefix.train.trainer import Trainer

ROW_CAPACITY = 110


def config(folder: Path, dataset: str, **sections) -> str:
    """Rows of at most one or two conversations, so that a step has several."""
    data = {"row_capacity": ROW_CAPACITY, "global_batch_size": 4}
    sections.setdefault("train", {"steps": 6})
    return write_config(folder / "run.yaml", dataset, folder / "run", data=data, **sections)


def saved_rows(path: Path) -> tuple[int, list[MicroBatch], list[np.ndarray]]:
    """The step, its rows and their reference log-probabilities, from the file alone."""
    with np.load(path, allow_pickle=False) as kept:
        arrays = dict(kept)
    rows, ref_logps = [], []
    for i in range(sum(name.endswith("_lengths") for name in arrays)):
        own = {k.removeprefix(f"row{i}_"): x for k, x in arrays.items() if k.startswith(f"row{i}_")}
        layout = TreeLayout.from_parents(own.pop("lengths").tolist(), own.pop("parents").tolist())
        ref_logps.append(own.pop("ref_logps"))
        own["logit_token"] = own.pop("source_row")
        rows.append(MicroBatch(layout=layout, num_tokens=len(own["tokens"]), **own))
    return int(arrays["step"]), rows, ref_logps


def replayed(path: Path, settings: Config, dataset: str) -> tuple[float, list[bool]]:
    """Loss of the kept rows under the newest checkpoint, and whether each row's is finite."""
    _, rows, ref_logps = saved_rows(path)
    weight = sum(float(row.pair_weights.sum()) for row in rows)
    with join_world(settings.parallel, settings.train.seed) as world:
        run = prepare_trainer(settings, PreferenceDataset(dataset), None, world)
        model = build_model(run.initial.transformer_config(settings.train.seed), world)
        load_weights(settings.train.save, model)
        run.close()
        for chunk in model:
            for parameter in chunk.parameters():
                assert torch.isfinite(parameter).all()
        batches = [
            to_device(row, world.device, {"pair": weight}).with_reference(torch.from_numpy(ref))
            for row, ref in zip(rows, ref_logps, strict=True)
        ]
        model[0].config.grad_scale_func = None
        model[0].config.finalize_model_grads_func = None
        logs = run_schedule(model, batches, check(settings.loss))
    return sum(float(log["loss"]) for log in logs), finite_rows(logs)


def test_a_run_that_diverges_is_stopped_and_replayed(dataset, tmp_path, capsys):
    """A learning rate of 1e30 makes every step after the first overflow."""
    path = config(tmp_path, dataset, optimizer={"lr": 1e30})
    code, message = command(["train", "--config", path], capsys)
    assert code == 1 and "Traceback" not in message
    assert "the loss of step 2 is not finite: rank 0 row 0 (groups " in message
    kept = tmp_path / "run" / "nonfinite-step0000002-rank0.npz"
    assert str(kept) in message and "optimizer.lr" in message
    assert [row["step"] for row in lines(tmp_path / "run")] == [1]
    loss, finite = replayed(kept, load_config(path), dataset)
    assert not np.isfinite(loss) and not all(finite)


def poison(monkeypatch, step: int, kind: str) -> None:
    """Make row 1 of a step have a loss, or a gradient, that is not finite."""
    gradients, bad = Trainer._gradients, []

    def poisoned(self, batches, is_first=False):
        if self.step + 1 != step:
            return gradients(self, batches, is_first)
        if not bad:
            bad.append(batches[1])
        logs = gradients(self, batches, is_first)
        if kind == "loss":
            logs[1]["loss"].fill_(float("nan"))
        elif any(batch is bad[0] for batch in batches):
            parameter = next(p for p in self.policy.chunks[0].parameters() if p.requires_grad)
            parameter.main_grad.view(-1)[0] = float("inf")
        return logs

    monkeypatch.setattr(Trainer, "_gradients", poisoned)


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("step", [1, 4])
def test_the_row_is_named_and_its_step_can_be_replayed(
    dataset, tmp_path, capsys, monkeypatch, kind, step
):
    (tmp_path / "clean").mkdir()
    clean = config(tmp_path / "clean", dataset)
    assert command(["train", "--config", clean], capsys)[0] == 0
    expected = lines(tmp_path / "clean" / "run")
    path = config(tmp_path, dataset)
    with monkeypatch.context() as patched:
        poison(patched, step, kind)
        code, message = command(["train", "--config", path], capsys)
    kept = tmp_path / "run" / f"nonfinite-step{step:07d}-rank0.npz"
    found_step, rows, _ = saved_rows(kept)
    groups = ", ".join(map(str, sorted(set(rows[1].response_ids[:, 0].tolist()))))
    assert code == 1 and "Traceback" not in message
    assert f"the {kind} of step {step} is not finite: rank 0 row 1 (groups {groups})." in message
    assert f"weights are those of step {step - 1}" in message and str(kept) in message
    assert found_step == step and len(rows) >= 2
    assert lines(tmp_path / "run") == expected[: step - 1]
    if step > 1:
        loss, finite = replayed(kept, load_config(path), dataset)
        assert all(finite)
        assert loss == pytest.approx(expected[step - 1]["loss"], rel=1e-6)
    assert command(["train", "--config", path], capsys)[0] == 0, "goes on from the checkpoint"
    assert lines(tmp_path / "run") == expected


def test_weights_that_are_not_finite_stop_the_first_step(dataset, finished, tmp_path, capsys):
    """A checkpoint to start from may hold them."""
    source = tmp_path / "bad"
    settings = load_config(write_config(tmp_path / "a.yaml", dataset, finished))
    with join_world(settings.parallel, 0) as world:
        run = prepare_trainer(settings, PreferenceDataset(dataset), None, world)
        policy = run.policy
        parameters = policy.chunks[0].named_parameters()
        next(p for n, p in parameters if "final_layernorm" in n).data[0] = float("nan")
        RunCheckpoints(source).save(
            1, policy.chunks, policy.optimizer, policy.scheduler, {}, {}, lambda directory: None
        )
        run.close()
    path = config(tmp_path, dataset, model={"checkpoint": str(source)})
    code, message = command(["train", "--config", path], capsys)
    assert code == 1 and "is not finite" in message and "Traceback" not in message
    assert not (tmp_path / "run" / "saved" / "latest_checkpointed_iteration.txt").exists()


def test_an_evaluation_that_is_not_finite_stops_before_it_is_saved(
    dataset, other, tmp_path, capsys
):
    path = write_config(
        tmp_path / "run.yaml",
        dataset,
        tmp_path / "run",
        data={"valid": other},
        optimizer={"lr": 1e30},
        train={"steps": 1},
    )
    code, message = command(["train", "--config", path], capsys)
    assert code == 1 and "the evaluation after step 1 is not finite" in message
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert not (tmp_path / "run" / "saved" / "latest_checkpointed_iteration.txt").exists()
