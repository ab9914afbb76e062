"""The examples of adapters fit their GPUs, and run scaled down in their layout."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from launch_recipes import GPUS, LAUNCH, NUM_PARAMETERS, ROOT, raw_config, scaled_down, write_model
from runs import TIMEOUT_S, on_processes

from megatron_prefix.config import load_config
from megatron_prefix.estimate.planning import plan_run
from megatron_prefix.testing import write_random_set

EXAMPLES = ROOT / "examples" / "lora"
USABLE_GIB = 70
"""Of an H100's 80 GB, without what CUDA, NCCL and fragmentation take."""
PARTS = ("weights", "adapters", "gradients", "optimizer")
BUFFERS = ("activations", "head", "attention")
"""In one column of the table."""
RECIPES = [("8b", 1, 8192, 41_943_040), ("70b", GPUS, 8192, 207_093_760)]
RECIPES += [("70b", GPUS, 16384, 207_093_760)]
LAYOUTS = {
    "8b": (1, {}),
    "70b": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
}


def planned(name: str, folder: Path, num_gpus: int, row_tokens: int, **changes: None) -> dict:
    hf = write_model(folder / name, name)
    settings = [f"model.hf={hf}", f"data.row_capacity={row_tokens}"]
    config = load_config(EXAMPLES / f"{name}.yaml", settings)
    return plan_run(replace(config, **changes), num_gpus)


@pytest.mark.parametrize(("name", "num_gpus", "row_tokens", "trained"), RECIPES)
def test_the_real_model_fits_its_gpus(name, num_gpus, row_tokens, trained, tmp_path):
    plan = planned(name, tmp_path, num_gpus, row_tokens)
    assert plan["trained_parameters"] == trained
    assert sum(plan["parameters"].values()) == NUM_PARAMETERS[name] + trained
    (stage,) = plan["memory"]["stages"]
    gib = {part: size / 2**30 for part, size in stage.items()}
    assert gib["total"] < USABLE_GIB and gib["reference"] == 0
    cells = [*(gib[part] for part in PARTS), sum(gib[part] for part in BUFFERS), gib["total"]]
    written = " | ".join(f"{cell:.1f}" for cell in cells)
    line = f"| `{name}.yaml` | {num_gpus} | {row_tokens} | {written} |"
    assert line in (EXAMPLES / "README.md").read_text(encoding="utf-8")


def test_all_weights_would_not_fit(tmp_path):
    """What the README says of it."""
    (stage,) = planned("8b", tmp_path, 1, 8192, lora=None)["memory"]["stages"]
    assert stage["total"] > 2 * USABLE_GIB * 2**30
    reference = stage["reference"] / 2**30
    states = (stage["gradients"] + stage["optimizer"]) / 2**30
    text = " ".join((EXAMPLES / "README.md").read_text(encoding="utf-8").split())
    assert f"{reference:.1f} GiB more for the reference, and {states:.0f} GiB for" in text


def test_there_are_no_others():
    assert {path.stem for path in EXAMPLES.glob("*.yaml")} == LAYOUTS.keys()


@pytest.mark.parametrize("name", LAYOUTS)
def test_it_runs_scaled_down(name, tmp_path):
    count, layout = LAYOUTS[name]
    file = f"../lora/{name}.yaml"
    assert (LAUNCH / file).resolve() == EXAMPLES / f"{name}.yaml"
    assert raw_config(file).get("parallel", {}).keys() == layout.keys()
    train = write_random_set(tmp_path / "train", 0, 13)
    valid = write_random_set(tmp_path / "valid", 1, 5)
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(scaled_down(file, layout, tmp_path, train, valid, 2)))
    on_processes(count, tmp_path, [["train", "--config", str(config)]], TIMEOUT_S)
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 2 and losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[1] != losses[0] and math.isfinite(losses[1])
    assert sum("eval_loss" in line for line in lines) == 3
    saved = tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt"
    assert saved.read_text().strip() == "2"
