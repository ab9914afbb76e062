"""The examples run as they are, and stay short."""

from __future__ import annotations

import math
import re
import runpy
import sys
from functools import partial

import yaml
from processes import forked
from small_runs import trained
from toy import ROOT, make_toy

from megatron_prefix.config import parse_config

EXAMPLES = ROOT / "examples"


def run_script(argv: list[str]) -> None:
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


def test_own_megatron_loop_learns_from_ln_2(tmp_path):
    script = EXAMPLES / "own_megatron_loop.py"
    assert len(script.read_text(encoding="utf-8").splitlines()) <= 60
    argv = [str(script), make_toy(tmp_path)]
    code = forked(partial(run_script, argv), tmp_path / "log", timeout_s=120)
    printed = (tmp_path / "log").read_text()
    assert code == 0, printed
    losses = [float(x) for x in re.findall(r"loss ([0-9.]+)", printed)]
    assert len(losses) == 5
    assert abs(losses[0] - math.log(2)) < 1e-4
    assert losses[-1] < losses[0] - 0.05


def test_the_quickstarts_configuration_is_complete():
    raw = yaml.safe_load((EXAMPLES / "quickstart" / "dpo.yaml").read_text(encoding="utf-8"))
    assert parse_config(raw).data.sharing == "tree"


def test_the_reward_model_of_the_examples_learns(tmp_path):
    """Scaled down to the toy set of a few letters."""
    raw = yaml.safe_load((EXAMPLES / "reward" / "reward.yaml").read_text(encoding="utf-8"))
    raw["data"] |= {"train": make_toy(tmp_path), "valid": None}
    raw["train"] |= {"steps": 14, "eval_interval": None, "save": None}
    raw["logging"] = {"output": str(tmp_path / "run")}
    rows = trained(parse_config(raw))
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.05
    assert rows[-1]["rewards/accuracies"] > 0.75
