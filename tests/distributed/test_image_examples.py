"""The examples of models that read images fit their GPUs, and run scaled down in their layout."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import transformers
import yaml
from image_runs import build, make_model, records
from launch_recipes import GPUS, ROOT
from runs import TIMEOUT_S, on_processes

from megatron_prefix.config import load_config
from megatron_prefix.estimate.planning import plan_run

EXAMPLES = ROOT / "examples" / "images"
USABLE_GIB = 70
"""Of an H100's 80 GB, without what CUDA, NCCL and fragmentation take."""
PARTS = ("weights", "adapters", "gradients", "optimizer")
BUFFERS = ("activations", "head", "attention")
"""In one column of the table."""
QWEN_TEXT = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": [16, 24, 24],
    },
}
QWEN_VISION = {"hidden_size": 1280, "out_hidden_size": 3584}
SIZES = {
    "llava-7b": lambda: transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(vocab_size=32064)
    ),
    "qwen-7b": lambda: transformers.Qwen2_5_VLConfig(
        text_config=QWEN_TEXT, vision_config=QWEN_VISION, tie_word_embeddings=False
    ),
}
"""What the models' own config.json say of their sizes."""
NUM_PARAMETERS = {"llava-7b": 7_063_427_072, "qwen-7b": 8_292_166_656}
RECIPES = [("llava-7b", 1, 8192), ("qwen-7b", GPUS, 8192)]


@pytest.mark.parametrize(("name", "num_gpus", "row_tokens"), RECIPES)
def test_the_real_model_fits_its_gpus(name, num_gpus, row_tokens, tmp_path):
    SIZES[name]().save_pretrained(tmp_path / name)
    settings = [f"model.hf={tmp_path / name}", f"data.row_capacity={row_tokens}"]
    plan = plan_run(load_config(EXAMPLES / f"{name}.yaml", settings), num_gpus)
    adapters = plan["parameters"].get("adapters", 0)
    assert sum(plan["parameters"].values()) - adapters == NUM_PARAMETERS[name]
    (stage,) = plan["memory"]["stages"]
    gib = {part: size / 2**30 for part, size in stage.items()}
    assert gib["total"] < USABLE_GIB and gib["reference"] == 0
    cells = [*(gib[part] for part in PARTS), sum(gib[part] for part in BUFFERS), gib["total"]]
    written = " | ".join(f"{cell:.1f}" for cell in cells)
    line = f"| `{name}.yaml` | {num_gpus} | {row_tokens} | {written} |"
    assert line in (EXAMPLES / "README.md").read_text(encoding="utf-8"), line


def test_there_are_no_others():
    assert {Path(path).stem for path in EXAMPLES.glob("*.yaml")} == SIZES.keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "family", "count"), [("llava-7b", "llava", 1), ("qwen-7b", "qwen2_5_vl", 2)]
)
def test_it_runs_scaled_down(name, family, count, tmp_path):
    """All settings but sizes, paths and precision are the example's."""
    raw = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text(encoding="utf-8"))
    model = make_model(tmp_path / "model", family)
    data = build(model, records(tmp_path / "records"), tmp_path / "data")
    raw["data"] |= {"train": data, "valid": data, "row_capacity": 600, "global_batch_size": 3}
    raw["model"] |= {"hf": str(model), "dtype": "float32"}
    raw["train"] |= {"save": str(tmp_path / "saved"), "load": str(tmp_path / "saved")}
    raw["train"] |= {"eval_interval": 1, "save_interval": 2}
    raw["optimizer"] |= {"lr": 1e-3, "lr_warmup_steps": 0}
    raw["logging"]["output"] = str(tmp_path / "run")
    commands = []
    if raw["loss"].get("reference") == "precomputed":
        raw["loss"]["ref_logps"] = str(tmp_path / "reference")
        commands.append(["score", "--config", "CONFIG", "--output", str(tmp_path / "reference")])
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(raw))
    commands.append(["train", "--config", "CONFIG"])
    commands = [[str(config) if x == "CONFIG" else x for x in command] for command in commands]
    on_processes(count, tmp_path, commands, TIMEOUT_S)
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    losses = [row["loss"] for row in map(json.loads, text.splitlines()) if "loss" in row]
    assert len(losses) == 2 and losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[1] != losses[0] and math.isfinite(losses[1])
    assert (tmp_path / "saved" / "latest_checkpointed_iteration.txt").read_text().strip() == "2"
