"""Several references in layouts of two processes: weights and runs are those of one process."""

from __future__ import annotations

import pytest
from ranked_sets import write_ranked_set
from reference_files import write_references
from runs import CUT, NUM_GROUPS, TIMEOUT_S, Runs, assert_same_history, on_processes

from megatron_prefix.config import load_config

LAYOUTS = {
    "tp2sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "cp2": {"context_parallel_size": 2},
    "dp2 zero": {"use_distributed_optimizer": True},
}
LOSSES = {
    "harmonic": {
        "loss_type": ["sigmoid", "sft"],
        "reference_mixture": "harmonic",
        "reference_weights": "adaptive",
        "ld_alpha": 0.25,
    },
    "multi": {"loss_type": "ipo", "reference_mixture": "multi_dpo"}
    | {"reference_weights": "thompson"},
    "geometric": {"reference_mixture": "geometric", "reference_weights": "sliding_window"}
    | {"reference_window": 9},
}
CASES = [("multi", layout) for layout in LAYOUTS]
CASES += [("harmonic", "cp2"), ("harmonic", "pp2"), ("geometric", "dp2 zero")]
SIZES = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4}
SIZES |= {"num_query_groups": 2, "init_method_std": 0.1}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    folder = tmp_path_factory.mktemp("references")
    runs = Runs(folder, write_ranked_set(folder / "ranked", 0, NUM_GROUPS), row_capacity=160)
    runs.valid = write_ranked_set(folder / "held-out", 1, 5)
    scored = runs.config("score", loss={"ld_alpha": 0.25}, model=SIZES)
    references = write_references(folder / "files", load_config(scored))

    def command(name: str, layout: str | None) -> list[str]:
        loss = {"references": references, **LOSSES[name]}
        parallel = {} if layout is None else LAYOUTS[layout]
        title = f"{name} {layout or 'alone'}"
        return runs.train(title, parallel=parallel, model=SIZES, loss=loss)

    on_processes(1, folder, [command(name, None) for name in LOSSES], TIMEOUT_S)
    on_processes(2, folder, [command(*case) for case in CASES], 2 * TIMEOUT_S)
    # killed after its second step, and resumed on two processes
    runs.cut("multi alone", "multi resumed", CUT)
    resumed = runs.train(
        "multi resumed",
        parallel=LAYOUTS["cp2"],
        model=SIZES,
        loss={"references": references, **LOSSES["multi"]},
    )
    on_processes(2, folder, [resumed], TIMEOUT_S)
    return runs


@pytest.mark.parametrize(("name", "layout"), [*CASES, ("multi", "resumed")])
def test_two_processes_follow_one(runs, name, layout):
    ours, theirs = runs.lines(f"{name} {layout}"), runs.lines(f"{name} alone")
    assert_same_history(ours, theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in (x for x in b if "reference_" in x):
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6), (a["step"], key)


def test_the_losses_differ(runs):
    """So the comparison can fail."""
    losses = [runs.lines(f"{name} alone")[-1]["eval_loss"] for name in LOSSES]
    assert len({round(loss, 3) for loss in losses}) == len(losses)
