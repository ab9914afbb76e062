"""The last lines of a run name what it left, and commands that run."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_models import tiny_config

from megatron_prefix.__main__ import make_parser
from megatron_prefix.checkpoint.keeping import Keeping, note_best
from megatron_prefix.train.closing import closing_lines, stopped_message


def test_without_checkpoints(tmp_path):
    first, page, second = closing_lines(tiny_config("set", tmp_path / "run"), 2, Path("r.html"))
    assert page == "report: r.html"
    assert first == f"done after 2 steps: configuration and metrics are in {tmp_path / 'run'}"
    assert "weights are not kept" in second


def test_the_next_commands_are_ones(tmp_path):
    saved = tmp_path / "my run"
    saved.mkdir()
    best = {"metric": "eval_loss", "mode": "min"}
    config = tiny_config(
        "set",
        tmp_path / "run",
        data={"valid": "held"},
        train={"save": str(saved), "keep_best": best},
    )
    assert len(closing_lines(config, 2, Path("r.html"))) == 4, "no checkpoint is the best yet"
    note_best(saved, 1, 0.5, Keeping(**best))
    first, _, noted, *commands = closing_lines(config, 2, Path("r.html"))
    assert str(saved) in first and noted == "best checkpoint: step 1, eval_loss 0.5"
    evaluate, export = (shlex.split(line.removeprefix("next: ")) for line in commands)
    args = make_parser().parse_args(evaluate[1:])
    assert (args.command, args.load) == ("evaluate", str(saved))
    args = make_parser().parse_args(export[1:])
    assert (args.direction, args.load) == ("export", str(saved))


@pytest.mark.parametrize("load", [None, "saved", "elsewhere"])
def test_a_stopped_run_says_what_goes_on(tmp_path, load):
    config = tiny_config("set", tmp_path / "run", train={"save": "saved", "load": load})
    override = [] if load == "saved" else ["train.load=saved"]
    first, second = stopped_message(config, 3, SimpleNamespace(failure_detection=None)).splitlines()
    assert first == "stopped by a signal after step 3 (saved in saved)"
    args = make_parser().parse_args(shlex.split(second.removeprefix("next: "))[1:])
    assert (args.config, args.overrides) == (f"{tmp_path / 'run'}/config.yaml", override)
    of_several = stopped_message(config, 3, SimpleNamespace(failure_detection="on")).splitlines()[1]
    assert of_several == " ".join(
        ["next: the same command", *(["with"] * bool(override)), *override]
    )


def test_adapters_are_exported_as_such(tmp_path):
    config = tiny_config("set", tmp_path, train={"save": str(tmp_path / "saved")}, lora={"r": 4})
    assert closing_lines(config, 2, Path("r.html"), True)[-1].endswith(f"--hf {tmp_path}/adapter")
    of_experts = {"r": 4, "target_modules": ["up_proj"]}
    config = tiny_config("set", tmp_path, train={"save": str(tmp_path / "s")}, lora=of_experts)
    assert closing_lines(config, 2, Path("r.html"))[-1].endswith(f"--hf {tmp_path}/adapter")
    assert closing_lines(config, 2, Path("r.html"), True)[-1].endswith(
        "have no other form: no export"
    )
    config = replace(config, model=replace(config.model, checkpoint="base"))
    last = closing_lines(config, 2, Path("r.html"), True)[-1].removeprefix("next: ")
    args = make_parser().parse_args(shlex.split(last)[1:])
    assert (args.hf, args.merge) == (f"{tmp_path}/hf", True)
