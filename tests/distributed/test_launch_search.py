"""`plan --search` has no faster layout for the launch examples that leaves memory to spare."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from launch_recipes import EIGHT_NODES, FOUR_NODES, GPUS, LAUNCH, SIXTEEN_NODES, write_model

from megatron_prefix.config import load_config
from megatron_prefix.data import BuildOptions, build_dataset
from megatron_prefix.estimate import named_hardware, search_layouts

pytestmark = pytest.mark.slow

MEMORY_GIB = 73.7
"""With it a run may fill 65.3 GiB: 5 GiB less than on a GPU of 79."""
KNOWN = 1.05
"""Ratio of times that the formulas do not tell from 1."""
LONG = ("parallel.context_parallel_size=2",)
BEST = [
    ("8b/dpo.yaml", "8b", 1, ()),
    ("70b/dpo.yaml", "70b", 4, ()),
    ("70b/dpo.yaml", "70b", 8, EIGHT_NODES),
    ("70b/dpo.yaml", "70b", 16, SIXTEEN_NODES),
    ("long/dpo.yaml", "8b", 1, ()),
    ("long/dpo.yaml", "8b", 4, LONG),
    ("moe/dpo.yaml", "moe", 2, ()),
    ("moe/dpo.yaml", "moe", 4, FOUR_NODES),
]


@pytest.fixture(scope="module")
def pairs(data_dir, tmp_path_factory) -> str:
    """HH-RLHF as bytes."""
    prefix = tmp_path_factory.mktemp("pairs") / "hh"
    build_dataset([data_dir / "hh_pairs.jsonl.gz"], "bytes", prefix, BuildOptions())
    return str(prefix)


@pytest.fixture(scope="module")
def long_prompts(tmp_path_factory) -> str:
    """Prompts of 12,000 to 16,000 tokens."""
    folder, rng = tmp_path_factory.mktemp("long"), random.Random(0)

    def text(num_tokens: int) -> str:
        return "".join(rng.choices("abcdefghij ", k=num_tokens))

    with (folder / "long.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(128):
            record = {
                "prompt": text(rng.randint(12_000, 16_000)),
                "chosen": text(rng.randint(200, 1500)),
                "rejected": text(rng.randint(200, 1500)),
            }
            file.write(json.dumps(record) + "\n")
    build_dataset([folder / "long.jsonl"], "bytes", folder / "long", BuildOptions())
    return str(folder / "long")


@pytest.mark.parametrize(
    ("file", "model", "nodes", "overrides"), BEST, ids=[f"{x[0]} {x[2]}" for x in BEST]
)
def test_no_layout_with_as_much_memory_to_spare_is_faster(
    pairs, long_prompts, tmp_path: Path, file, model, nodes, overrides
):
    hf = write_model(tmp_path / model, model)
    data = long_prompts if file.startswith("long") else pairs
    given = [f"model.hf={hf}", f"data.train={data}", "data.valid=null", *overrides]
    machine = named_hardware("H100", MEMORY_GIB)
    assert machine is not None
    result = search_layouts(load_config(LAUNCH / file, given), nodes * GPUS, machine)
    own, best = result["own"], result["layouts"][0]
    assert own is not None, "it does not fit"
    assert own["seconds_per_step"] <= KNOWN * best["seconds_per_step"], best
