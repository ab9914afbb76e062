"""The launch examples: the models they are for, their node counts, and how each is scaled down."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "examples" / "launch"
GPUS = 8
LLAMA = {
    "model_type": "llama",
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
HF_CONFIGS = {
    "8b": LLAMA
    | {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336}
    | {"num_attention_heads": 32},
    "70b": LLAMA
    | {"num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672}
    | {"num_attention_heads": 64},
    "moe": {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 48,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
}
"""What the models' own config.json say of their sizes."""
NUM_PARAMETERS = {"8b": 8_030_261_248, "70b": 70_553_706_496, "moe": 30_532_122_624}
EIGHT_NODES = (
    "parallel.tensor_model_parallel_size=2",
    "parallel.pipeline_model_parallel_size=8",
    "parallel.context_parallel_size=4",
)
SIXTEEN_NODES = (
    "parallel.tensor_model_parallel_size=2",
    "parallel.pipeline_model_parallel_size=16",
    "parallel.virtual_pipeline_model_parallel_size=5",
    "parallel.context_parallel_size=4",
)
FOUR_NODES = (
    "parallel.pipeline_model_parallel_size=4",
    "parallel.virtual_pipeline_model_parallel_size=4",
    "parallel.context_parallel_size=2",
    "parallel.expert_model_parallel_size=2",
)
"""Overrides that README.md and the files name for other numbers of nodes."""


@dataclass(frozen=True)
class Recipe:
    """An example on a number of nodes; `gib` is what README.md says that its fullest rank needs."""

    file: str
    model: str
    nodes: int
    gib: float
    overrides: tuple[str, ...] = ()


RECIPES = [
    Recipe("8b/dpo.yaml", "8b", 1, 52.4),
    Recipe("70b/dpo.yaml", "70b", 4, 60.7),
    Recipe("70b/dpo.yaml", "70b", 8, 48.0),
    Recipe("70b/dpo.yaml", "70b", 8, 63.2, EIGHT_NODES),
    Recipe("70b/dpo.yaml", "70b", 16, 41.6),
    Recipe("70b/dpo.yaml", "70b", 16, 47.4, SIXTEEN_NODES),
    Recipe("70b/reward.yaml", "70b", 4, 60.7),
    Recipe("70b/reward.yaml", "70b", 8, 48.0),
    Recipe("70b/reward.yaml", "70b", 8, 63.2, EIGHT_NODES),
    Recipe("70b/reward.yaml", "70b", 16, 41.6),
    Recipe("70b/reward.yaml", "70b", 16, 47.4, SIXTEEN_NODES),
    Recipe("long/dpo.yaml", "8b", 1, 52.7),
    Recipe("long/dpo.yaml", "8b", 4, 44.3),
    Recipe("long/dpo.yaml", "8b", 4, 61.5, ("parallel.context_parallel_size=2",)),
    Recipe("moe/dpo.yaml", "moe", 2, 60.7),
    Recipe("moe/dpo.yaml", "moe", 4, 50.1),
    Recipe("moe/dpo.yaml", "moe", 4, 64.3, FOUR_NODES),
]
FILES = sorted({recipe.file for recipe in RECIPES})
TINY = {"num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4}
TINY |= {"num_query_groups": 2, "init_method_std": 0.1}
EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24}
EXPERTS |= {"qk_layernorm": True}
SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
)
GOES_WITH = {
    "tensor_model_parallel_size": ("sequence_parallel",),
    "pipeline_model_parallel_size": ("virtual_pipeline_model_parallel_size",),
    "context_parallel_size": ("cp_comm",),
}
"""Settings that have no effect if a size is 1."""


def raw_config(file: str) -> dict:
    return yaml.safe_load((LAUNCH / file).read_text(encoding="utf-8"))


def kinds_of(parallel: dict) -> set[str]:
    """Which kinds of parallelism a layout has."""
    return {key for key, value in parallel.items() if value not in (1, False)}


def smaller_layouts(parallel: dict, most: int = 4) -> list[dict]:
    """The same kinds, every size 2, in layouts of which each leaves data parallelism of 2 to
    `most` processes or fills them; together they have every kind."""
    small = {key: 2 if key in SIZES else value for key, value in parallel.items()}
    used = [key for key in (*GOES_WITH, "expert_model_parallel_size") if key in small]
    if 2 ** len(used) < most or used == ["expert_model_parallel_size"]:
        return [small]
    of_tensors = "tensor_model_parallel_size" in small
    return [small, without(small, f"{'tensor_model' if of_tensors else 'context'}_parallel_size")]


def without(parallel: dict, *sizes: str) -> dict:
    """A layout with some sizes 1."""
    gone = {name for size in sizes for name in (size, *GOES_WITH.get(size, ()))}
    return {key: value for key, value in parallel.items() if key not in gone}


def alone(parallel: dict, size: str) -> dict:
    """A layout with no size but one above 1."""
    small = {key: 2 if key in SIZES else value for key, value in parallel.items()}
    return without(small, *({*GOES_WITH, "expert_model_parallel_size"} - {size}))


def scaled_down(file: str, layout: dict, folder: Path, train: str, valid: str, steps: int) -> dict:
    """An example with tiny sizes on `layout`; all its other settings stay."""
    raw = raw_config(file)
    data, model, loss = raw["data"], raw["model"], raw.get("loss", {})
    data |= {"train": train, "row_capacity": 120, "global_batch_size": 4}
    if "valid" in data:
        data["valid"] = valid
        raw["train"]["eval_interval"] = 1
    model.pop("hf")
    model |= TINY | {"dtype": "float32"}
    if "expert_model_parallel_size" in raw.get("parallel", {}):
        model |= EXPERTS
    if "recompute_num_layers" in model:
        model["recompute_num_layers"] = 1
    raw["parallel"] = layout
    if "ref_logps" in loss:
        loss["ref_logps"] = str(folder / "prefs.ref")
    raw["optimizer"] |= {"lr": 1e-3, "lr_warmup_steps": 0}
    raw["train"].pop("epochs")
    saved = str(folder / "checkpoints")
    raw["train"] |= {"steps": steps, "save": saved, "load": saved, "save_interval": steps}
    raw["logging"]["output"] = str(folder / "run")
    return raw


def write_model(folder: Path, model: str) -> Path:
    """A directory that has a model's config.json and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(HF_CONFIGS[model]))
    return folder
