"""The shadow run in layouts of two processes: sound runs pass and go on as if it had not been, and
a wrong boundary between a prompt and its responses is caught in each.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from labelled_sets import write_labelled_set
from processes import on_ranks
from ranked_sets import write_ranked_set
from runs import TIMEOUT_S, Runs, on_processes

from megatron_prefix.__main__ import main
from megatron_prefix.layout import TreeLayout
from megatron_prefix.testing import free_port

SIZES = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4}
SIZES |= {"num_query_groups": 2, "init_method_std": 0.1}
TP2SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
VPP2 = {**PP2, "virtual_pipeline_model_parallel_size": 2}
OVERLAPS = {"use_distributed_optimizer": True, "overlap_grad_reduce": True}
OVERLAPS |= {"overlap_param_gather": True}
MOE = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24}
MOE |= {"moe_aux_loss_coeff": 0.01, "untie_embeddings_and_output_weights": False}
KTO = {"loss_type": "kto", "beta": 0.5}

LAYOUTS = {  # name: layout, model, loss
    "tp2sp": (TP2SP, {}, {"loss_type": ["ipo", "sft"], "ld_alpha": 0.5}),
    "pp2": (PP2, {"untie_embeddings_and_output_weights": False}, {"loss_type": "plackett_luce"}),
    "vpp2": (VPP2, {"num_layers": 4, "recompute_granularity": "selective"}, {}),
    "cp2": ({"context_parallel_size": 2}, {}, {"use_weighting": True, "ld_alpha": 0.5}),
    "dp2 overlaps": (OVERLAPS, {"dtype": "bfloat16"}, {"loss_type": "aot"}),
    "dp2 kto": (OVERLAPS, {}, KTO),
}
MORE = {
    "ep2 overlaps": ({**OVERLAPS, "expert_model_parallel_size": 2}, MOE, {}),
    "dp2 reward": (OVERLAPS, {"kind": "reward"}, {"loss_type": "regression"}),
    "vpp2 kto": (VPP2, {"num_layers": 4, "recompute_granularity": "selective"}, KTO),
    "cp2 bco": ({"context_parallel_size": 2}, {}, {"loss_type": "bco"}),
    "tp2sp list": (TP2SP, {}, {"loss_type": ["kto", "bco"]}),
}
LABELLED = ("dp2 kto", "vpp2 kto", "cp2 bco", "tp2sp list")
NUM_STEPS = 3


def command(runs: Runs, name: str, shadow_steps: int, suffix: str) -> list[str]:
    layout, model, loss = {**LAYOUTS, **MORE}[name]
    output = f"{name} {suffix}"
    saved = str(runs.output(output) / "saved")
    train = {"steps": NUM_STEPS, "save": saved, "shadow_steps": shadow_steps}
    data = {"train": runs.data, "row_capacity": 160, "global_batch_size": 4, "seed": 3}
    if name in LABELLED:
        data["train"] = str(runs.folder / "labelled")
    sections = {"parallel": layout, "model": {**SIZES, **model}, "loss": loss, "train": train}
    return runs.train(output, **sections, data=data)


def with_wrong_boundaries(commands: list[tuple[list[str], int]]) -> int:
    """Run each command with layouts in which the first token of every first child of a branch is
    counted as its parent's, so that its siblings see it. Each must exit with 1."""
    import os

    sound = TreeLayout.from_parents.__func__

    def shifted(cls, lengths, parents):
        lengths, parents = np.array(lengths), np.array(parents)
        for parent in np.unique(parents[parents >= 0]):
            children = np.flatnonzero(parents == parent)
            if len(children) > 1 and lengths[children[0]] > 1:
                lengths[parent] += 1
                lengths[children[0]] -= 1
        return sound(cls, lengths, parents)

    TreeLayout.from_parents = classmethod(shifted)
    for argv, port in commands:
        os.environ["MASTER_PORT"] = str(port)
        if main(argv) != 1:
            print(f"not caught: {argv}")
            return 3
    return 0


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    folder = tmp_path_factory.mktemp("shadow")
    runs = Runs(folder, write_ranked_set(folder / "ranked", 0, 9, weighted=False), 160)
    write_labelled_set(folder / "labelled", 0, 9, mismatches=True)
    run_both(runs, LAYOUTS, folder)
    return runs


def run_both(runs: Runs, names, folder: Path) -> None:
    """Each layout without and with a shadow run of two steps."""
    commands = [
        command(runs, name, *case) for name in names for case in ((0, "alone"), (2, "shadow"))
    ]
    on_processes(2, folder, commands, 2 * TIMEOUT_S)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_run_is_as_if_it_had_not_been(runs, name):
    assert_as_without(runs, name)


@pytest.mark.slow
def test_experts_and_rewards(runs, tmp_path):
    run_both(runs, MORE, tmp_path)
    for name in MORE:
        assert_as_without(runs, name)
    assert_caught(runs, MORE, tmp_path)


def assert_as_without(runs: Runs, name: str) -> None:
    """Bit for bit: metrics of all steps, evaluations and weights."""
    times = ("step_time_s", "pairs_per_second", "wall_time_s", "memory_gib")
    times += ("tokens_per_second", "tokens_per_second/logical")
    with_it, without = (
        [{k: x for k, x in row.items() if k not in times} for row in runs.lines(f"{name} {suffix}")]
        for suffix in ("shadow", "alone")
    )
    assert len(with_it) == NUM_STEPS
    assert with_it == without
    ours, theirs = (runs.weights(f"{name} {suffix}", NUM_STEPS) for suffix in ("shadow", "alone"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_there_is_one_report_per_run(runs):
    texts = [(runs.folder / f"rank{rank}-of-2.log").read_text() for rank in (0, 1)]
    reports = [line for line in texts[0].splitlines() if "train.shadow_steps = 2" in line]
    assert len(reports) == len(LAYOUTS) and all("same to rounding" in line for line in reports)
    assert "train.shadow_steps" not in texts[1]


def test_a_wrong_boundary_is_caught(runs, tmp_path: Path):
    assert_caught(runs, LAYOUTS, tmp_path)


def assert_caught(runs: Runs, names, folder: Path) -> None:
    commands = [(command(runs, name, 1, "wrong"), free_port()) for name in names]
    on_ranks(2, partial(with_wrong_boundaries, commands), folder, 2 * TIMEOUT_S)
    text = (folder / "rank0-of-2.log").read_text()
    assert text.count("it is not the same step: the ") == len(names), text[-3000:]
    assert " of response " in text
    for name in names:
        assert not runs.lines(f"{name} wrong"), "a step was written"
