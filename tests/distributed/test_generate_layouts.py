"""Sample answers in layouts of two processes: the same as on one, and training goes on alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs import TIMEOUT_S, Runs, on_processes

from megatron_prefix.train.pace import MEASURED

SIZES = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4}
SIZES |= {"num_query_groups": 2, "init_method_std": 0.2}
MOE = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24}
PP2 = {"pipeline_model_parallel_size": 2}
OVERLAPS = {"use_distributed_optimizer": True, "overlap_grad_reduce": True}
OVERLAPS |= {"overlap_param_gather": True}
LAYOUTS = {  # name: layout, model
    "tp2sp": ({"tensor_model_parallel_size": 2, "sequence_parallel": True}, {}),
    "pp2": (PP2, {"untie_embeddings_and_output_weights": False}),
    "vpp2": ({**PP2, "virtual_pipeline_model_parallel_size": 2}, {"num_layers": 4}),
    "cp2": ({"context_parallel_size": 2}, {}),
    "ep2 overlaps": ({**OVERLAPS, "expert_model_parallel_size": 2}, MOE),
}
PROMPTS = ["Say something", "What is a tree?", "a longer prompt than these two", "x"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    """Every layout on two processes, and its model on one; each also without answers."""
    folder = tmp_path_factory.mktemp("answers")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": x}) + "\n" for x in PROMPTS))
    runs = Runs(folder)
    generate = {"prompts": str(prompts), "every": 1, "max_new_tokens": 6, "temperature": 0.8}

    def command(name: str, layout: dict, model: dict, **train) -> list[str]:
        sections = {"model": SIZES | model, "parallel": layout, "train": {"steps": 2, **train}}
        return runs.train(name, **sections)

    alone, together = [], []
    for name, (layout, model) in LAYOUTS.items():
        alone.append(command(f"{name} alone", {}, model, generate=generate))
        together.append(command(name, layout, model, generate=generate))
        together.append(command(f"{name} plain", layout, model))
    on_processes(1, folder, alone, TIMEOUT_S)
    on_processes(2, folder, together, 2 * TIMEOUT_S)
    return runs


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", LAYOUTS)
def test_answers_are_those_of_one_process(runs, name):
    own, expected = (lines(runs.output(x) / "samples.jsonl") for x in (name, f"{name} alone"))
    assert [x["step"] for x in own[:1] + own[-1:]] == [0, 2]
    assert len(own) == 3 * 2 * len(PROMPTS)
    assert own == expected


@pytest.mark.parametrize("name", LAYOUTS)
def test_training_goes_on_as_without_them(runs, name):
    own, plain = (lines(runs.output(x) / "metrics.jsonl") for x in (name, f"{name} plain"))
    assert own[0].keys() and len(own) == 2 + 2
    for a, b in zip(own, plain, strict=True):
        assert a.keys() == b.keys()
        assert {k: x for k, x in a.items() if k not in MEASURED and b[k] != x} == {}
