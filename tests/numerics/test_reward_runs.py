"""Runs of reward models: one trajectory in every layout, and what they read and write."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import configure, lines, prepare, saved_weights, trained
from test_trajectory import LAYOUTS, settled_seed

from megatron_prefix.__main__ import main
from megatron_prefix.checkpoint.starting_model import resolve_starting_model
from megatron_prefix.config import Config, load_config
from megatron_prefix.data.build.builder import build_dataset
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.distributed.world import join_world
from megatron_prefix.engine.optimizer import build_model
from megatron_prefix.errors import InputError, RunError
from megatron_prefix.train.evaluation import evaluate
from megatron_prefix.train.scoring import score_reference

STEPS = 6
REWARD = {"kind": "reward"}
LOSS = {"center_rewards_coefficient": 0.01}
TOLERANCES = {"loss": 1e-5, "grad_norm": 1e-5}


class Runs:
    """Reward models trained on one data set, each layout once."""

    def __init__(self, folder: Path, dataset: str) -> None:
        self.folder, self.dataset = folder, dataset
        self.data = {"global_batch_size": 4, "seed": settled_seed(dataset, 4)}
        self.known: dict[str, tuple] = {}

    def __call__(self, layout: str) -> tuple[list[dict], dict[str, torch.Tensor]]:
        if layout not in self.known:
            output = self.folder / layout
            config = configure(
                output,
                self.dataset,
                data={**self.data, **LAYOUTS[layout]},
                model={**REWARD, "init_method_std": 0.05},
                loss=LOSS,
                train={"steps": STEPS, "save": str(output / "saved")},
            )
            self.known[layout] = trained(config), saved_weights(config.train.save, STEPS)
        return self.known[layout]


@pytest.fixture(
    scope="module", params=["few_hh", pytest.param("few_oasst", marks=pytest.mark.slow)]
)
def runs(request, tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), request.getfixturevalue(request.param))


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "unpacked"])
def test_every_layout_follows_the_unpacked_run(runs, layout):
    rows, weights = runs(layout)
    expected, expected_weights = runs("unpacked")
    assert min(row["loss"] for row in expected) < 0.6, "nothing was learned"
    assert not any(key.startswith("logps/") for row in rows for key in row)
    for ours, theirs in zip(rows, expected, strict=True):
        for key, tolerance in TOLERANCES.items():
            assert abs(ours[key] - theirs[key]) <= tolerance * abs(theirs[key]), (ours, theirs)
        for key in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
            assert abs(ours[key] - theirs[key]) <= 1e-3 * max(abs(theirs[key]), 1e-2), key
        assert ours["rewards/accuracies"] == theirs["rewards/accuracies"]
    assert weights.keys() == expected_weights.keys() and "score.weight" in weights
    for name, weight in expected_weights.items():
        assert (weights[name] - weight).abs().max() <= 1e-4, name


@pytest.fixture(scope="module")
def done(random_set, tmp_path_factory) -> Config:
    """A finished run of six steps, evaluated every second one and saved."""
    output = tmp_path_factory.mktemp("done")
    config = configure(
        output / "run",
        random_set,
        data={"valid": random_set},
        model=REWARD,
        train={"save": str(output / "saved"), "save_interval": 3, "eval_interval": 2},
    )
    trained(config)
    return config


def test_evaluate_equals_the_evaluation_of_the_run(done, random_set, tmp_path):
    last = lines(Path(done.logging.output))[-1]
    file = tmp_path / "rewards.jsonl"
    metrics = evaluate(
        load_config(Path(done.logging.output) / "config.yaml"), done.train.save, file
    )
    assert {f"eval_{key}": value for key, value in metrics.items()} == pytest.approx(
        {key: value for key, value in last.items() if key != "step"}, rel=1e-6
    )
    assert metrics.keys() >= {
        *("loss", "rewards/chosen", "rewards/rejected", "rewards/margins"),
        *("rewards/accuracies", "rewards/mean", "rewards/min", "rewards/max", "num_pairs"),
    }
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert all(
        row.keys() == {"group", "response", "record", "reward", "num_tokens"} for row in rows
    )
    data = PreferenceDataset(random_set)
    rewards = np.array([row["reward"] for row in rows])
    pairs = (
        data.pair_responses
        + np.repeat(np.asarray(data.group_responses[:-1]), np.diff(data.group_pairs))[:, None]
    )
    margins = rewards[pairs[:, 0]] - rewards[pairs[:, 1]]
    assert metrics["rewards/margins"] == pytest.approx(margins.mean(), rel=1e-9)
    assert metrics["rewards/accuracies"] == pytest.approx((margins > 0).mean(), rel=1e-9)


def test_a_resumed_run_continues_exactly(done, random_set, tmp_path):
    saved = tmp_path / "saved"
    shutil.copytree(done.train.save, saved)
    shutil.rmtree(saved / "iter_0000006")
    (saved / "latest_checkpointed_iteration.txt").write_text("3")
    resumed = trained(
        configure(
            tmp_path / "run",
            random_set,
            model=REWARD,
            train={"save": str(saved), "load": str(saved)},
        )
    )
    expected = [
        row for row in lines(Path(done.logging.output)) if "loss" in row and row["step"] > 3
    ]
    assert [row["loss"] for row in resumed] == [row["loss"] for row in expected]
    ours, theirs = saved_weights(saved, 6), saved_weights(done.train.save, 6)
    assert all(torch.equal(ours[name], x) for name, x in theirs.items())


def test_no_reference_is_held(random_set, tmp_path):
    config = configure(tmp_path / "run", random_set, model=REWARD)
    with join_world(config.parallel, 0) as world:
        run = prepare(config, world)
        assert not hasattr(run.reference, "chunks")
        assert run.identity["reference model fingerprint"] is None
        run.close()


def test_score_is_refused(done, tmp_path):
    with pytest.raises(InputError, match="has no reference, .*: use evaluate --per-response"):
        score_reference(done, str(tmp_path / "sidecar"))


def head(world, model: Config, dataset: str, seed: int = 1234) -> tuple[torch.Tensor, str | None]:
    """The head that a model section begins with, and the note about it."""
    initial = resolve_starting_model(model, [PreferenceDataset(dataset)])
    chunks = build_model(initial.transformer_config(seed), world)
    initial.load(chunks)
    return chunks[0].score.weight.detach().clone(), initial.note(seed)


@pytest.mark.parametrize("untied", [True, False])
def test_a_reward_model_may_start_from_a_language_models_checkpoint(
    untied, random_set, tmp_path, capsys
):
    sizes = {"untie_embeddings_and_output_weights": untied}
    lm = configure(
        tmp_path / "lm", random_set, model=sizes, train={"steps": 1, "save": str(tmp_path / "ck")}
    )
    trained(lm)
    model = {**REWARD, "checkpoint": str(tmp_path / "ck")}
    save = {"steps": 1, "save": str(tmp_path / "reward")}
    config = configure(tmp_path / "run", random_set, model=model, train=save)
    capsys.readouterr()
    trained(config)
    assert "is a language model: the reward head is drawn from train.seed = 1234" in (
        capsys.readouterr().out
    )
    with join_world(config.parallel, 0) as world:
        drawn, _ = head(world, config.model, random_set)
        scratch, note = head(world, configure(tmp_path, random_set, model=REWARD).model, random_set)
        other, _ = head(world, config.model, random_set, seed=5)
        assert note is None and torch.equal(drawn, scratch) and not torch.equal(drawn, other)
    kept, ours = saved_weights(tmp_path / "ck", 1), saved_weights(tmp_path / "reward", 1)
    assert ours.keys() - kept.keys() == {"score.weight"}
    for name in ours.keys() & kept.keys():  # one step of 1e-3 away
        assert 0 < (ours[name] - kept[name]).abs().max() < 2e-3, name


def test_kinds_are_not_mixed_up(done, random_set, tmp_path):
    """A policy is no reward model's checkpoint, nor is one resumed or evaluated as the other."""
    lm_saved = str(tmp_path / "lm")
    trained(configure(tmp_path / "a", random_set, train={"steps": 1, "save": lm_saved}))
    reward_saved = done.train.save
    cases = [
        ({"model": {"checkpoint": reward_saved}}, "a reward model's checkpoint"),
        ({"train": {"load": reward_saved}}, "a reward model's checkpoint"),
        ({"model": REWARD, "train": {"load": lm_saved}}, "a language model's checkpoint"),
    ]
    for sections, message in cases:
        with pytest.raises(InputError, match=message):
            trained(configure(tmp_path / "b", random_set, **sections))
    valid = {"valid": random_set}
    for model, load, message in (
        (REWARD, lm_saved, "a language model's checkpoint"),
        ({}, reward_saved, "a reward model's checkpoint"),
    ):
        config = configure(tmp_path / "c", random_set, data=valid, model=model)
        with pytest.raises(InputError, match=message):
            evaluate(config, load, None)


def margins_set(folder: Path, margins: list[float | None]) -> str:
    """PREFIX of a pair for each margin; None leaves it out."""
    records = [
        {"prompt": f"Say {i}:", "chosen": " yes indeed", "rejected": " no"}
        | ({} if margin is None else {"margin": margin})
        for i, margin in enumerate(margins)
    ]
    folder.mkdir()
    (folder / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    build_dataset([folder / "in.jsonl"], "bytes", folder / "set")
    return str(folder / "set")


def test_margins_reach_the_loss(tmp_path):
    """Weights start where scores are 0: the first loss is log(1 + e^m), on average."""
    margins = [0.0, 0.5, 1.0, 4.0]
    dataset = margins_set(tmp_path / "data", margins)
    config = configure(
        tmp_path / "run",
        dataset,
        data={"valid": dataset},
        model={**REWARD, "init_method_std": 1e-12},
        loss={"margin": True},
        train={"steps": 1, "eval_interval": 1},
    )
    expected = np.mean(np.log1p(np.exp(margins)))
    rows = trained(config)
    assert rows[0]["eval_loss"] == pytest.approx(expected, rel=1e-9)
    assert rows[1]["loss"] == pytest.approx(expected, rel=1e-9)


def test_pairs_without_a_margin_are_counted(tmp_path):
    dataset = margins_set(tmp_path / "data", [0.5, None, 1.0, None])
    sections = {"model": REWARD, "loss": {"margin": True}}
    message = r"data.train: 2 of the 4 pairs .* \(first in group 1, record 1\)"
    with pytest.raises(InputError, match=message):
        trained(configure(tmp_path / "run", dataset, **sections))
    with pytest.raises(InputError, match="data.valid: 2 of the 4 pairs"):
        evaluate(
            configure(tmp_path / "run", dataset, data={"valid": dataset}, **sections), None, None
        )
    trained(configure(tmp_path / "plain", dataset, model=REWARD, train={"steps": 1}))


def test_a_run_that_diverges_saves_its_rows(random_set, tmp_path):
    config = configure(tmp_path / "run", random_set, model=REWARD, optimizer={"lr": 1e30})
    with pytest.raises(RunError, match="the loss of step 2 is not finite"):
        trained(config)
    with np.load(tmp_path / "run" / "nonfinite-step0000002-rank0.npz") as kept:
        assert "row0_source_row" in kept and "row0_ref_logps" not in kept


def test_compare_takes_reward_models(done, capsys):
    """Two directories of one run differ by nothing."""
    path = Path(done.logging.output)
    copy = path.with_name("copy")
    copy.mkdir(exist_ok=True)
    (copy / "metrics.jsonl").write_text((path / "metrics.jsonl").read_text())
    assert main(["compare", str(path), str(copy)]) == 0
    assert "| copy | 0.0e+00 | 0.0e+00 | 0.0e+00 |" in capsys.readouterr().out
