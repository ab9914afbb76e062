"""The examples run as they stand, and stay as short as they promise."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys

import yaml
from toy import ROOT, make_toy

from megatron_prefix.config import parse_config

EXAMPLES = ROOT / "examples"


def test_own_megatron_loop_learns_from_ln_2(tmp_path):
    script = EXAMPLES / "own_megatron_loop.py"
    assert len(script.read_text(encoding="utf-8").splitlines()) <= 60
    done = subprocess.run(
        [sys.executable, script, make_toy(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    losses = [float(x) for x in re.findall(r"loss ([0-9.]+)", done.stdout)]
    assert len(losses) == 5
    assert abs(losses[0] - math.log(2)) < 1e-4
    assert losses[-1] < losses[0] - 0.05


def test_the_quickstarts_configuration_is_complete():
    raw = yaml.safe_load((EXAMPLES / "quickstart" / "dpo.yaml").read_text(encoding="utf-8"))
    assert parse_config(raw).data.sharing == "tree"
