"""Whole runs with adapters: rows change nothing, checkpoints, evaluation, references, bytes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from ranked_sets import write_ranked_set
from small_runs import configure, lines, prepare, saved_state, saved_weights, timeless, trained

from megatron_prefix.config import Config
from megatron_prefix.distributed.world import join_world
from megatron_prefix.errors import InputError
from megatron_prefix.model.gpt import unwrap
from megatron_prefix.train import evaluate, score_reference
from megatron_prefix.train.first_step import check_first_value

STEPS = 6
LORA = {"r": 4, "lora_alpha": 8}
UNPACKED = {"sharing": "none", "packing": False, "row_capacity": None, "micro_batch_size": 6}
REWARD = {"kind": "reward", "init_method_std": 0.05}
OBJECTIVES = {  # of every unit and scope: loss section, model section
    "pairs and tokens": ({"loss_type": ["sigmoid", "bco_pair", "sft"]}, {}),
    "no reference": ({"loss_type": "simpo", "beta": 2.0}, {}),
    "tails": ({"loss_type": "sigmoid", "ld_alpha": 0.25}, {}),
    "on policy": ({"loss_type": "ipo", "use_weighting": True}, {}),
    "sets": ({"loss_type": "plackett_luce"}, {}),
    "responses": ({"loss_type": ["nca", "infonca"], "temperature": 0.5}, {}),
    "step": ({"loss_type": "aot"}, {}),
    "rewards": ({"loss_type": "bradley_terry"}, REWARD),
    "regression": ({"loss_type": "regression"}, REWARD),
}


@pytest.fixture(scope="session")
def ranked_set(tmp_path_factory) -> str:
    """PREFIX of eight conversations."""
    return write_ranked_set(tmp_path_factory.mktemp("ranked_lora") / "set", 0, 8)


def run_of(folder: Path, dataset: str, name: str, **sections: dict) -> Config:
    """A run with adapters that saves; `sections` go on top."""
    train = {"steps": STEPS, "save": str(folder / name / "saved"), **sections.pop("train", {})}
    sections["lora"] = {**LORA, **sections.get("lora", {})}
    sections["model"] = {"init_method_std": 0.1, **sections.get("model", {})}
    return configure(folder / name, dataset, train=train, **sections)


@pytest.fixture(scope="module")
def start(random_set, tmp_path_factory) -> Config:
    """A run of six steps at a high learning rate: its adapters are far from 0."""
    config = run_of(
        tmp_path_factory.mktemp("start"), random_set, "run",
        optimizer={"lr": 0.05}, data={"valid": random_set}, train={"save_interval": 3},
    )  # fmt: skip
    trained(config)
    return config


def adapted(start: Config) -> dict[str, str]:
    return {"adapter": str(start.train.save), "r": None, "lora_alpha": None}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_packed_trees_follow_the_unpacked_run(objective, ranked_set, random_set, tmp_path):
    loss, model = OBJECTIVES[objective]
    dataset = random_set if objective == "step" else ranked_set  # aot takes no weights of pairs
    layouts = {"tree": {"sharing": "tree", "row_capacity": 300}, "unpacked": UNPACKED}
    runs = {
        name: trained(
            run_of(
                tmp_path,
                dataset,
                name,
                loss=loss,
                model=model,
                data=data,
                # Adam would make a whole step of the rounding of a gradient near 0.
                optimizer={"lr": 5e-3, "adam_eps": 1e-4},
                lora={"modules_to_save": None},
            )  # fmt: skip
        )
        for name, data in layouts.items()
    }
    assert len(runs["tree"]) == STEPS
    for ours, theirs in zip(runs["tree"], runs["unpacked"], strict=True):
        for key in ("loss", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), (ours["step"], key)
    weights = [saved_weights(tmp_path / name / "saved", STEPS) for name in layouts]
    for name, x in weights[0].items():
        assert (x - weights[1][name]).abs().max() <= 1e-4, name


def test_the_first_loss_is_known(start):
    first = lines(Path(start.logging.output))[0]
    assert first["step"] == 0 and first["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["eval_rewards/margins"] == 0


def test_a_run_resumes_to_the_bit(start, random_set, tmp_path):
    first = run_of(tmp_path, random_set, "cut", optimizer={"lr": 0.05}, train={"steps": 3})
    trained(first)
    again = run_of(
        tmp_path, random_set, "cut", optimizer={"lr": 0.05}, train={"load": first.train.save}
    )
    rows = [row for row in lines(Path(start.logging.output)) if "loss" in row]
    assert timeless(trained(again)) == timeless(rows)
    ours, theirs = (saved_state(c.train.save, STEPS)[0] for c in (again, start))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())


def test_a_checkpoint_has_adapters_and_their_base_only(start):
    tensors, common = saved_state(start.train.save, STEPS)
    weights = {name: x for name, x in tensors.items() if not name.startswith("optimizer.")}
    assert all(".adapters." in name for name in weights) and len(weights) == 2 * 7 * 2
    moments = [name for name in tensors if name.startswith("optimizer.state.exp_avg.")]
    assert len(moments) == len(weights)
    saved = common["lora"]
    assert saved["settings"]["r"] == 4 and len(saved["base_fingerprint"]) == 64
    assert saved["base"] == {}


def test_evaluation_of_a_checkpoint_is_that_of_the_run(start, tmp_path):
    file = tmp_path / "logps.jsonl"
    values = evaluate(start, str(start.train.save), str(file))
    last = lines(Path(start.logging.output))[-1]
    assert last["step"] == STEPS
    for key in ("loss", "rewards/margins", "logps/chosen"):
        assert values[key] == pytest.approx(last[f"eval_{key}"], rel=1e-6)
    assert abs(values["rewards/margins"]) > 0.01
    base = evaluate(start, None, None)
    assert base["rewards/margins"] == 0


@pytest.mark.parametrize("reference", ["base", "start"])
def test_a_sidecar_is_the_reference(reference, start, random_set, tmp_path):
    """From an adapter, with either reference; a file of the other one is refused."""
    lora = {**adapted(start), "reference": reference}
    live = run_of(tmp_path, random_set, "live", lora=lora)
    sidecar = str(tmp_path / "reference")
    score_reference(live, sidecar)
    known = {"reference": "precomputed", "ref_logps": sidecar}
    rows, expected = trained(run_of(tmp_path, random_set, "known", lora=lora, loss=known)), []
    expected = trained(live)
    for ours, theirs in zip(rows, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    is_known = abs(expected[0]["loss"] - math.log(2)) < 1e-6
    assert is_known == (reference == "start")
    other = {**lora, "reference": "start" if reference == "base" else "base"}
    with pytest.raises(InputError, match="reference model of fingerprint"):
        trained(run_of(tmp_path, random_set, "other", lora=other, loss=known))
    if reference == "base":  # the base alone is the model without a lora section
        plain = configure(tmp_path / "plain", random_set, model={"init_method_std": 0.1})
        score_reference(plain, str(tmp_path / "of the base"))
        known["ref_logps"] = str(tmp_path / "of the base")
        trained(run_of(tmp_path, random_set, "again", lora=lora, loss=known, train={"steps": 1}))


def test_another_start_has_a_first_loss_that_is_checked(start, random_set, tmp_path, capsys):
    trained(run_of(tmp_path, random_set, "run", lora=adapted(start), train={"steps": 1}))
    text = capsys.readouterr().out
    assert "policy (lora.adapter) and reference (base) differ, so no value is known" in text
    of_the_step = {"lora": adapted(start), "loss": {"loss_type": "aot"}, "train": {"steps": 1}}
    trained(run_of(tmp_path, random_set, "of the step", **of_the_step))
    assert "so no value is known" in capsys.readouterr().out
    with join_world(start.parallel, 0) as world:
        trainer = prepare(run_of(tmp_path, random_set, "x", lora=adapted(start)), world)
        with pytest.raises(Exception, match="the first loss is 0.5"):
            check_first_value(0.5, 0.5001, trainer.objective, world)
        trainer.close()


def test_the_reference_stays_while_the_policy_moves(start, random_set, tmp_path):
    """Adapters off, or as they were at the start, after steps of training; nothing is left off."""
    with join_world(start.parallel, 0) as world:
        for reference in ("base", "start"):
            lora = {**adapted(start), "reference": reference}
            config = run_of(tmp_path, random_set, reference, lora=lora, optimizer={"lr": 0.02})
            trainer = prepare(config, world)
            before = trainer.reference.score(trainer.sampler)
            policy = {n: x.clone() for n, x in trainer.policy.chunks[0].named_parameters()}
            trainer.train_step()
            after = trainer.reference.score(trainer.sampler)
            assert np.array_equal(before, after, equal_nan=True)
            moved = dict(trainer.policy.chunks[0].named_parameters())
            assert sum(not torch.equal(x, moved[name]) for name, x in policy.items()) == 28
            trainer.close()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"seed": 5}}, "belong to another base model .*drawn weights"),
        ({"lora": {"r": 8}}, "lora.r: 4 in the checkpoint, 8 now"),
        ({"lora": {"target_modules": ["q_proj"]}}, "lora.target_modules"),
    ],
)
def test_adapters_of_another_run_are_refused(sections, message, start, random_set, tmp_path):
    train = {"load": str(start.train.save), **sections.get("train", {})}
    config = run_of(tmp_path, random_set, "run", **{**sections, "train": train})
    with pytest.raises(InputError, match=message):
        trained(config)


def test_adapters_are_not_taken_for_a_model(start, random_set, tmp_path):
    saved = str(start.train.save)
    plain = configure(tmp_path / "a", random_set, train={"load": saved})
    with pytest.raises(InputError, match="has only adapters, whose base is drawn weights"):
        trained(plain)
    with pytest.raises(InputError, match=f"has only adapters of a model.*lora.adapter: {saved}"):
        trained(configure(tmp_path / "b", random_set, model={"checkpoint": saved}))
    with pytest.raises(InputError, match="has only adapters"):
        evaluate(configure(tmp_path / "c", random_set, data={"valid": random_set}), saved, None)
    full = configure(tmp_path / "full", random_set, train={"steps": 1, "save": str(tmp_path / "w")})
    trained(full)
    with pytest.raises(InputError, match="has all weights of a model, and this run trains adapt"):
        evaluate(start, str(tmp_path / "w"), None)
    with pytest.raises(InputError, match="lora.adapter = .*but all weights of a model"):
        trained(run_of(tmp_path, random_set, "d", lora={"adapter": str(tmp_path / "w")}))
    with pytest.raises(InputError, match="neither a PEFT directory"):
        trained(run_of(tmp_path, random_set, "e", lora={"adapter": str(tmp_path / "none")}))


def test_settings_beside_an_adapter_must_agree(start, random_set, tmp_path):
    with pytest.raises(InputError, match="lora.r = 8, and the adapter has 4: leave them out"):
        trained(run_of(tmp_path, random_set, "a", lora={**adapted(start), "r": 8}))
    agreed = {**adapted(start), "r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    trained(run_of(tmp_path, random_set, "b", lora=agreed, train={"steps": 1, "save": None}))
    with pytest.raises(InputError, match="lora.reference = base has no effect"):
        lora, loss = {**adapted(start), "reference": "base"}, {"loss_type": "simpo"}
        trained(run_of(tmp_path, random_set, "c", lora=lora, loss=loss))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("is_distributed", [False, True])
def test_gradients_and_optimizer_are_those_of_adapters_only(
    dtype, is_distributed, random_set, tmp_path
):
    """Exact bytes. The base is in the model's precision, once, and there is no second model."""
    config = run_of(
        tmp_path, random_set, "run", model={"dtype": dtype}, lora={"target_modules": ["q_proj"]},
        parallel={"use_distributed_optimizer": is_distributed}, train={"steps": 1, "save": None},
    )  # fmt: skip
    with join_world(config.parallel, 0) as world:
        trainer = prepare(config, world)
        trainer.train_step()
        (chunk,) = trainer.policy.chunks
        named = dict(chunk.named_parameters())
        # rank 4, from and to 64 channels, in each of 2 layers
        trained_numel = 2 * (4 * 64 + 64 * 4)
        assert sum(x.numel() for x in named.values() if x.requires_grad) == trained_numel
        buffers = [*chunk.buffers, *chunk.expert_parallel_buffers]
        gradients = sum(b.grad_data.numel() * b.grad_data.element_size() for b in buffers)
        padding = 64 * 4 if is_distributed else 0  # a bucket of the distributed optimizer
        assert 4 * trained_numel <= gradients <= 4 * trained_numel + padding
        kept = {b.grad_data.untyped_storage().data_ptr() for b in buffers}
        grads = [x.grad for x in named.values() if x.grad is not None]
        assert {x.untyped_storage().data_ptr() for x in grads} <= kept
        (part,) = trainer.policy.optimizer.chained_optimizers
        state = part.optimizer.state
        moments = [x for own in state.values() for x in own.values() if x.dim()]
        assert sum(x.numel() * x.element_size() for x in moments) == 8 * trained_numel
        if dtype == "bfloat16":
            assert all(parameter.dtype == torch.float32 for parameter in state)
        base = [x for x in named.values() if not x.requires_grad]
        itemsize = 2 if dtype == "bfloat16" else 4
        assert {x.element_size() for x in base} == {itemsize}
        model = unwrap(chunk)
        assert {x.untyped_storage().data_ptr() for x in base} == {
            x.untyped_storage().data_ptr() for x in model.parameters() if not x.requires_grad
        }
        assert trainer.reference.chunks[0] is chunk.module
        trainer.close()


def test_bfloat16_follows_the_unpacked_run(random_set, tmp_path):
    """Within what bfloat16 rounds: the same run is compared with itself in other rows."""
    rows = [
        trained(
            run_of(
                tmp_path,
                random_set,
                name,
                model={"dtype": "bfloat16"},
                data=data,
                optimizer={"lr": 5e-3},
            )  # fmt: skip
        )
        for name, data in (("tree", {}), ("unpacked", UNPACKED))
    ]
    for ours, theirs in zip(*rows, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.05), ours["step"]
    assert rows[0][-1]["loss"] < 0.66
    assert json.dumps(rows[0][0]) and rows[0][0]["loss"] == pytest.approx(math.log(2), rel=1e-2)
