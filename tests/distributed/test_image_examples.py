"""The examples of models that read images fit their GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from launch_recipes import GPUS, ROOT

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
