"""Adapters that ranks of several layouts have saved are exported to the same bytes."""

from __future__ import annotations

import pytest
from runs import TIMEOUT_S, Runs, on_processes

from megatron_prefix.checkpoint import export_hf

LORA = {"r": 4, "lora_alpha": 8, "modules_to_save": ["embed_tokens"]}
LAYOUTS = {
    "tp2sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "dp2 zero": {"use_distributed_optimizer": True},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    """A run of one process, and runs that start from its adapters and do not change them: their
    learning rate is below what float32 resolves."""
    runs = Runs(tmp_path_factory.mktemp("lora_export"))

    def command(name: str, lr: float, lora: dict, parallel: dict) -> list[str]:
        train = {"steps": 1, "save": str(runs.output(name) / "saved")}
        return runs.train(
            name, train=train, optimizer={"lr": lr}, lora={**LORA, **lora}, parallel=parallel
        )

    on_processes(1, runs.folder, [command("one", 0.05, {}, {})], TIMEOUT_S)
    start = {"adapter": str(runs.output("one") / "saved")}
    commands = [command(name, 1e-30, start, layout) for name, layout in LAYOUTS.items()]
    on_processes(2, runs.folder, commands, 2 * TIMEOUT_S)
    return runs


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_exports_the_same_bytes(layout, runs, tmp_path):
    for name in ("one", layout):
        export_hf(runs.output(name) / "saved", tmp_path / name)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        ours, theirs = ((tmp_path / name / file).read_bytes() for name in (layout, "one"))
        assert ours == theirs and len(theirs) > 400, file
