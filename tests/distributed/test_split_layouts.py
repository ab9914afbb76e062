"""Trees in parts (`data.oversized: split`) in layouts of two processes: every one follows the run
of one process with whole trees."""

from __future__ import annotations

import pytest
from ranked_sets import write_ranked_set
from runs import (
    BATCH,
    NUM_GROUPS,
    NUM_STEPS,
    TIMEOUT_S,
    Runs,
    assert_same_history,
    assert_same_weights,
    on_processes,
)

SIZES = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4}
SIZES |= {"num_query_groups": 2, "init_method_std": 0.1}
CAPACITY = 44
LAYOUTS = {
    "cp2": {"context_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "tp2sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "dp2": {"use_distributed_optimizer": True},
}
OBJECTIVES = {  # name: loss section, model section beside the sizes
    "sigmoid": ({"loss_type": "sigmoid"}, {}),
    "plackett_luce": ({"loss_type": "plackett_luce"}, {}),
    "bradley_terry": ({"loss_type": "bradley_terry", "margin": True}, {"kind": "reward"}),
}
CASES = [(x, y) for x in ("sigmoid", "plackett_luce") for y in LAYOUTS]
CASES += [("bradley_terry", y) for y in ("cp2", "dp2")]
PRECOMPUTED = "sigmoid precomputed dp2"


def command(runs: Runs, objective: str, layout: str | None, **loss: str) -> list[str]:
    own, model = OBJECTIVES[objective]
    data = {"train": runs.data, "valid": runs.valid, "global_batch_size": BATCH, "seed": 3}
    data |= {"row_capacity": CAPACITY, "oversized": "split"} if layout else {"row_capacity": 160}
    parallel = LAYOUTS[layout] if layout else {}
    name = PRECOMPUTED if loss else f"{objective} {layout or 'whole'}"
    own = {**own, **loss}
    return runs.train(name, data=data, parallel=parallel, model={**SIZES, **model}, loss=own)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    folder = tmp_path_factory.mktemp("split")
    runs = Runs(folder, write_ranked_set(folder / "ranked", 0, NUM_GROUPS))
    runs.valid = write_ranked_set(folder / "held-out", 1, 5)
    whole = [command(runs, name, None) for name in OBJECTIVES]
    sidecar = str(folder / "sidecar")
    whole.append(["score", *whole[0][1:], "--output", sidecar])
    on_processes(1, folder, whole, TIMEOUT_S)
    cases = [command(runs, *case) for case in CASES]
    cases.append(command(runs, "sigmoid", "dp2", reference="precomputed", ref_logps=sidecar))
    on_processes(2, folder, cases, 2 * TIMEOUT_S)
    return runs


@pytest.mark.parametrize("name", [*(f"{x} {y}" for x, y in CASES), PRECOMPUTED])
def test_two_processes_follow_one_with_whole_trees(runs, name):
    whole = f"{name.split()[0]} whole"
    rows = [row for row in runs.lines(name) if "loss" in row]
    assert sum("logps/pass_difference" in row for row in rows) >= NUM_STEPS - 1
    assert sum(row["tokens/repeated"] for row in rows) > 50
    assert_same_history(runs.lines(name), runs.lines(whole))
    assert_same_weights(runs, name, whole)
