"""The first loss is ln 2 with rewards of 0, or the run stops with the reason."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from small_runs import configure, lines, prepare, trained

from megatron_prefix.config import load_config
from megatron_prefix.data.store.writer import DatasetWriter
from megatron_prefix.data.tokenize.tokenizers import load_tokenizer
from megatron_prefix.data.tree import Pair, ResponsePath, build_tree
from megatron_prefix.errors import RunError

LAYOUTS = {
    "tree": {},
    "pair": {"sharing": "pair"},
    "unpacked": {"sharing": "none", "packing": False, "micro_batch_size": 2},
}
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["dense", "path"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_first_loss_is_ln_2(random_set, tmp_path, layout, backend, dtype):
    config = configure(
        tmp_path,
        random_set,
        data=LAYOUTS[layout],
        model={"dtype": dtype, "attention_backend": backend},
        train={"steps": 2},
    )
    first, second = trained(config)
    assert abs(first["loss"] - math.log(2)) <= 1e-5
    assert all(abs(first[key]) <= 1e-5 for key in REWARDS)
    assert first["rewards/accuracies"] == 0.5
    assert second["rewards/chosen"] != 0


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ({"label_smoothing": 0.2}, math.log(2)),
        ({"weighting": "group"}, math.log(2)),
        ({"beta": 2.0}, math.log(2)),
        ({"loss_type": "ipo"}, 25.0),
        ({"loss_type": "ipo", "beta": 0.5}, 1.0),
        ({"loss_type": "sppo_hard"}, 50.0),
        ({"loss_type": "exo_pair", "label_smoothing": 0.01}, 1.6144631),
        (
            {"loss_type": ["sigmoid", "bco_pair", "hinge"], "loss_weights": [0.8, 0.2, 3.0]},
            1.2 * math.log(2) + 3.0,
        ),
    ],
    ids=[
        *("smoothing", "group", "beta", "ipo", "ipo, beta", "sppo_hard", "exo_pair", "a list"),
    ],
)
def test_whatever_the_loss(random_set, tmp_path, loss, expected):
    first = trained(configure(tmp_path, random_set, loss=loss, train={"steps": 1}))[0]
    assert abs(first["loss"] - expected) <= 1e-5 * max(1, expected)


@pytest.mark.parametrize(
    ("loss", "written"),
    [
        ({}, {"loss_type": "sigmoid", "beta": 0.1, "label_smoothing": 0.0}),
        ({"loss_type": "ipo", "beta": 0.5}, {"loss_type": "ipo", "beta": 0.5}),
        (
            {"loss_type": ["hinge", "ipo"], "loss_weights": [0.5, 1.0]},
            {"loss_type": ["hinge", "ipo"], "loss_weights": [0.5, 1.0], "beta": 0.1},
        ),
    ],
    ids=["sigmoid", "ipo", "a list"],
)
def test_config_yaml_has_every_setting_of_the_loss(random_set, tmp_path, loss, written):
    trained(configure(tmp_path, random_set, loss=loss, train={"steps": 1}))
    section = yaml.safe_load((tmp_path / "config.yaml").read_text())["loss"]
    of_all = {"weighting": "pair", "reference": "model", "f_divergence_type": "reverse_kl"}
    assert section == written | of_all
    load_config(tmp_path / "config.yaml")  # a run's own file can be read again


def scaled(name: str, factor: float) -> Callable[[torch.nn.Module], None]:
    def change(model: torch.nn.Module) -> None:
        dict(model.named_parameters())[name].mul_(factor)

    return change


def redrawn(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(9)
    for parameter in model.parameters():
        parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


def start_with_reference(config, world, change: Callable[[torch.nn.Module], None]) -> None:
    """Run with a reference that was changed after the run was prepared."""
    run = prepare(config, world)
    model = run.reference.chunks[0]
    with torch.no_grad():
        change(getattr(model, "module", model))
    try:
        run.run()
    finally:
        run.close()


@pytest.mark.parametrize(
    "change",
    [
        redrawn,
        scaled("decoder.final_layernorm.weight", 1.01),
        scaled("decoder.layers.1.mlp.linear_fc2.weight", 1.1),
    ],
    ids=["other weights", "norm 1 % off", "one matrix 10 % off"],
)
def test_a_differing_reference_stops_the_run(world, random_set, tmp_path, change):
    with pytest.raises(RunError) as stopped:
        start_with_reference(configure(tmp_path, random_set), world, change)
    message = str(stopped.value)
    assert "first loss" in message and "ln 2 = 0.6931" in message and "rewards of 0" in message
    assert "model.attention_backend: dense" in message
    assert not (tmp_path / "metrics.jsonl").read_text(), "a step was written"


def test_the_message_is_that_of_the_objective(world, random_set, tmp_path):
    config = configure(tmp_path, random_set, loss={"loss_type": "ipo"})
    with pytest.raises(RunError) as stopped:
        start_with_reference(config, world, redrawn)
    message = str(stopped.value)
    assert "loss.loss_type: ipo must start with a loss of 1 / (4 beta^2) = 25.0000" in message
    assert "ln 2" not in message


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_reference_that_is_not_finite_stops_the_run(world, random_set, tmp_path, factor):
    """Comparisons with not-a-number are all false; this must not pass for equal."""
    with pytest.raises(RunError):
        change = scaled("output_layer.weight", factor)
        start_with_reference(configure(tmp_path, random_set), world, change)
    assert not (tmp_path / "metrics.jsonl").read_text(), "a step was written"


def test_bfloat16_still_detects_other_weights(world, random_set, tmp_path):
    config = configure(tmp_path, random_set, model={"dtype": "bfloat16", "init_method_std": 0.2})
    with pytest.raises(RunError, match="first loss"):
        start_with_reference(config, world, redrawn)


def test_rewards_are_checked_if_the_loss_alone_shows_nothing(world, tmp_path):
    """With responses of 3 tokens, each 0.001 less likely, all margins are 0 and the loss ln 2."""
    rng = np.random.default_rng(2)
    with DatasetWriter(tmp_path / "even", load_tokenizer("bytes").describe()) as writer:
        for record in range(4):
            prompt = rng.integers(0, 256, 5)
            paths = [
                ResponsePath(tokens=np.append(prompt, rng.integers(0, 256, 3)), loss_start=5)
                for _ in range(2)
            ]
            writer.add(build_tree(paths, [Pair(chosen=0, rejected=1)]), record)
        writer.finish()
    run = prepare(configure(tmp_path / "run", str(tmp_path / "even")), world)
    run.reference.chunks[0].register_forward_hook(lambda model, inputs, logps: logps - 1e-3)
    with pytest.raises(RunError, match=r"loss is 0\.69314718 and the largest reward 3\.00e-04"):
        run.run()
    run.close()


def test_a_sound_run_is_not_stopped(world, random_set, tmp_path):
    start_with_reference(configure(tmp_path, random_set), world, lambda model: None)
    assert [row["step"] for row in lines(Path(tmp_path))] == [1, 2, 3, 4, 5, 6]
