"""The Python snippets of docs/library.md run as they are, one after another."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys

import yaml
from test_hf_parity import make
from toy import ROOT

CONFIG = {
    "data": {"train": "elsewhere", "row_capacity": 2048, "global_batch_size": 8},
    "model": {
        **{"num_layers": 1, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 2},
    },
    "train": {"steps": 1, "seed": 1},
    "optimizer": {"lr": 1.0e-3},
    "logging": {"output": "run"},
}


def snippets(page: str) -> list[str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return [
        code
        for code in re.findall(r"```python\n(.*?)```", text, re.S)
        if "# needs CUDA" not in code
    ]


def test_the_snippets_of_the_library_page_run(tmp_path):
    make("llama 2", tmp_path / "hf_model", vocab_size=320)
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
    codes = snippets("library.md")
    assert len(codes) >= 8
    body = "\n".join(codes)
    indented = "".join(f"    {line}\n" if line else "\n" for line in body.split("\n"))
    script = f"from megatron_prefix import platform\nwith platform.adapted():\n{indented}"
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "64 groups" in done.stdout
    loss = float(re.findall(r"^loss ([0-9.]+)", done.stdout, re.M)[-1])
    assert abs(loss - math.log(2)) < 1e-4
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    assert '"step": 2' in metrics
    assert (tmp_path / "hf_again" / "config.json").is_file()


def test_a_loss_of_ones_own_trains_by_its_place(random_set, tmp_path):
    """The module of docs/losses.md, on the Python path of the command line."""
    (code,) = snippets("losses.md")
    (tmp_path / "own_losses.py").write_text(code, encoding="utf-8")
    for name, loss_type in (("one", "own_losses:COSH"), ("list", ["sigmoid", "own_losses:COSH"])):
        config = CONFIG | {
            "data": CONFIG["data"] | {"train": random_set, "valid": random_set},
            "loss": {"loss_type": loss_type},
            "train": {"steps": 3},
            "logging": {"output": str(tmp_path / name)},
        }
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "megatron_prefix", "train", "--config", "run.yaml"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
        first = math.cosh(1) + (math.log(2) if name == "list" else 0)
        assert abs(rows[1]["loss"] - first) < 1e-5 and rows[-1]["eval_loss"] < first
        assert ("loss/cosh" in rows[1]) == (name == "list")
