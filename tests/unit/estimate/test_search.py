"""`plan --search`: what is tried, what fits, and that the fastest comes first."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from megatron_prefix.__main__ import main
from megatron_prefix.config import ModelConfig, ParallelConfig, load_config
from megatron_prefix.errors import InputError
from megatron_prefix.estimate import named_hardware, plan_run, search_layouts
from megatron_prefix.estimate.layouts import (
    divisors,
    parallel_layouts,
    recomputations,
    row_sizes,
)
from megatron_prefix.estimate.search import LayoutSearch, first_that_fits
from megatron_prefix.testing import write_random_set

SIZES = {
    "num_layers": 6,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "num_query_groups": 2,
}
EXPERTS = {"num_moe_experts": 4, "moe_ffn_hidden_size": 32}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_random_set(tmp_path_factory.mktemp("search") / "set", 0, 16)


@pytest.fixture
def written(tmp_path, data):
    def write(**sections) -> str:
        settings = {
            "data": {"train": data, "row_capacity": 120, "global_batch_size": 8},
            "model": {**SIZES, "dtype": "bfloat16", **sections.pop("model", {})},
            "optimizer": {"lr": 1e-3},
            "train": {"epochs": 1},
            "logging": {"output": str(tmp_path / "run")},
        }
        path = tmp_path / "config.yaml"
        path.write_text(json.dumps(settings | sections))
        return str(path)

    return write


def layouts_of(world_size: int, **model) -> set[tuple]:
    settings = ModelConfig(**SIZES | model)
    sizes = settings.sizes()
    assert sizes is not None
    return {
        (
            layout.tensor_model_parallel_size,
            layout.pipeline_model_parallel_size,
            layout.virtual_pipeline_model_parallel_size,
            layout.context_parallel_size,
            layout.expert_model_parallel_size,
        )
        for layout in parallel_layouts(world_size, settings, sizes, ParallelConfig())
    }


def test_divisors():
    assert [divisors(x) for x in (1, 12, 16)] == [[1], [1, 2, 3, 4, 6, 12], [1, 2, 4, 8, 16]]


def test_layouts_by_hand():
    """6 layers and 2 query groups on 4 processes: TP 1 or 2, PP 1 or 2 with chunks of 3 layers."""
    chunked = [(2, None), (2, 3)]
    expected = {(1, 1, None, cp, 1) for cp in (1, 2, 4)} | {(2, 1, None, cp, 1) for cp in (1, 2)}
    expected |= {(1, *stages, cp, 1) for stages in chunked for cp in (1, 2)}
    expected |= {(2, *stages, 1, 1) for stages in chunked}
    assert layouts_of(4) == expected
    # expert parallelism takes from the data- and context-parallel ranks that the stages leave
    assert {x[4] for x in layouts_of(4, **EXPERTS) if x[:2] == (1, 1)} == {1, 2, 4}
    assert {x[4] for x in layouts_of(4, **EXPERTS) if x[:2] == (2, 2)} == {1}


def test_what_follows_from_a_layout():
    model = ModelConfig(**SIZES)
    sizes, base = model.sizes(), ParallelConfig(context_parallel_size=2, cp_comm="all_gather")
    for layout in parallel_layouts(8, model, sizes, base):
        ranks = 8 // (layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size)
        assert layout.sequence_parallel == (layout.tensor_model_parallel_size > 1)
        assert layout.use_distributed_optimizer == layout.overlap_grad_reduce == (ranks > 1)
        assert layout.cp_comm == ("all_gather" if layout.context_parallel_size > 1 else None)


def test_rows_that_are_tried(written, data):
    config = load_config(written())
    assert [x.data.row_capacity for x in row_sizes(config)] == [60, 120, 240, 480]
    fixed = {"train": data, "row_capacity": 120, "rows_per_step": 4}
    assert row_sizes(load_config(written(data=fixed)))[0].data.row_capacity == 120
    assert len(row_sizes(load_config(written(data=fixed)))) == 1
    depends = load_config(written(model=EXPERTS | {"moe_aux_loss_coeff": 0.1}))
    assert len(row_sizes(depends)) == 1


def test_the_least_recomputation_that_fits():
    choices = recomputations(ModelConfig(**SIZES), 4)
    kinds = [(x.recompute_method, x.recompute_num_layers) for x in choices]
    blocks = [("block", count) for count in (1, 2, 3, 4)]
    assert kinds == [(None, None), *blocks, ("uniform", 2), ("uniform", 4)]
    for first in range(len(choices)):
        fitting = choices[first:5] if first < 5 else choices[first:]
        assert first_that_fits(choices, 4, lambda x, f=fitting: x in f) == choices[first]
    assert first_that_fits(choices, 4, lambda _: False) is None


def brute_force(search: LayoutSearch) -> list[float]:
    """Seconds of every layout, size of rows and recomputation that fits, one after another."""
    seconds = []
    for candidate in search.candidates():
        rows = search.rows_of(candidate)
        for model in recomputations(candidate.model, 6):
            config = replace(candidate, model=model)
            if rows is None or any(config.parallel.faults(model, search.known.sizes)):
                continue
            if search._fits(config, rows):
                seconds.append(search._timed(config, rows).seconds)
    return sorted(seconds)


@pytest.mark.parametrize("share", [1.0, 0.8, 0.5])
def test_the_first_is_the_best_of_all(written, share):
    """With less memory than the fastest needs, others are first; none of them is missed."""
    # rows as long as this make activations the larger part of the memory
    config = load_config(written(), ["data.row_capacity=40000000"])
    machine = named_hardware("H100", 4096)
    most = max(x["needed_gib"] for x in search_layouts(config, 4, machine)["layouts"])
    memory = (share * most + 4) / 0.94 + 0.01
    machine = named_hardware("H100", memory)
    result = search_layouts(config, 4, machine)
    listed = [x["seconds_per_step"] for x in result["layouts"]]
    assert listed == sorted(listed) and result["fitting"] > 0
    assert all(x["needed_gib"] <= result["usable_gib"] for x in result["layouts"])
    assert listed[0] == brute_force(LayoutSearch.of_config(config, 4, machine))[0]
    if share == 0.5:
        assert any(x["settings"]["model.recompute_method"] for x in result["layouts"])


def test_each_layout_has_its_best_rows(written):
    """Fewer, longer rows hide more of the gradients' traffic: the first size tried is not best."""
    config, machine = load_config(written()), named_hardware("H100")
    search = LayoutSearch.of_config(config, 4, machine)
    best: dict[tuple, list[float]] = {}
    for candidate in search.candidates():
        if (estimate := search.estimate(candidate)) is not None:
            seconds = best.setdefault(key_of(estimate.described()), [])
            seconds.append(estimate.seconds)
    assert any(seconds[0] > min(seconds) for seconds in best.values())
    for layout in search_layouts(config, 4, machine)["layouts"]:
        assert layout["seconds_per_step"] == min(best[key_of(layout)])


def key_of(layout: dict) -> tuple:
    """What of a layout is not the size of its rows."""
    return tuple(x for k, x in layout["settings"].items() if not k.startswith("data."))


def test_a_listed_layout_is_planned_alike(written):
    """Its settings, given to `plan`, give the same seconds and the same memory."""
    path, machine = written(), named_hardware("H100")
    for layout in search_layouts(load_config(path), 4, machine)["layouts"][:4]:
        given = [f"{key}={json.dumps(value)}" for key, value in layout["settings"].items()]
        plan = plan_run(load_config(path, given), 4, machine)
        assert plan["time"]["seconds_per_step"] == pytest.approx(layout["seconds_per_step"])
        assert plan["fit"]["needed_gib"] == pytest.approx(layout["needed_gib"])
        assert plan["pipeline"]["rows_per_rank"] == layout["rows_per_rank"]


def test_the_layout_of_the_file(written):
    parallel = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    path, machine = written(parallel=parallel), named_hardware("H100")
    result = search_layouts(load_config(path), 4, machine)
    own = result["own"]
    plan = plan_run(load_config(path), 4, machine)
    assert own["seconds_per_step"] == pytest.approx(plan["time"]["seconds_per_step"])
    assert own["seconds_per_step"] >= result["layouts"][0]["seconds_per_step"]
    assert search_layouts(load_config(path), 3, machine)["own"] is None


def test_more_memory_and_a_faster_gpu_are_never_slower(written):
    config = load_config(written(), ["data.row_capacity=10000000"])

    def best(*hardware) -> float:
        return search_layouts(config, 4, named_hardware(*hardware))["layouts"][0][
            "seconds_per_step"
        ]

    assert best("H100", 200) <= best("H100", 100) <= best("A100", 100)


def test_adapters_have_a_time(written):
    path = written(lora={"r": 4, "target_modules": "all-linear"})
    machine = named_hardware("H100")
    lora = plan_run(load_config(path), 2, machine)["time"]
    full = plan_run(load_config(written()), 2, machine)["time"]
    # of 3 forward passes of the frozen matrices 2 are left; far fewer gradients and states
    assert 2 / 3 < lora["seconds"]["compute"] / full["seconds"]["compute"] < 1
    assert lora["seconds"]["optimizer"] < full["seconds"]["optimizer"]
    assert search_layouts(load_config(path), 2, machine)["layouts"]


def test_a_stage_without_adapters_has_no_distributed_optimizer(written):
    """train refuses one whose rank has nothing to save."""
    path = written(lora={"r": 4, "target_modules": "all-linear", "layers_to_transform": [0]})
    search = LayoutSearch.of_config(load_config(path), 4, named_hardware("H100"))
    layouts = [config.parallel for config in search.candidates()]
    assert {x.pipeline_model_parallel_size for x in layouts} == {1, 2}
    for layout in layouts:
        is_shared = layout.use_distributed_optimizer
        ranks = 4 // (layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size)
        assert is_shared == (layout.pipeline_model_parallel_size == 1 and ranks > 1)
        assert layout.overlap_param_gather == is_shared


def test_the_table_and_the_json(written, capsys):
    argv = ["plan", "--config", written(), "--search", "--gpus", "4", "--memory", "80"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "4 GPUs, 71.2 of 80 GiB usable, H100 at 0.50 of its peak (no --gpu is named" in out
    assert "this file" in out and "to run the first: " in out and "not measurements" in out
    assert "=null" not in out.split("to run the first: ")[1]
    assert main([*argv, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["layouts"]) == 10 and result["tried"] >= result["fitting"] > 10


def test_fewer_gpus_are_searched_as_all_are(written, capsys):
    """A small batch on eight GPUs, and the same on the number that the line names."""
    path = written()
    argv = ["plan", "--config", path, "--search", "--gpus", "8", "--gpu", "H100"]
    assert main([*argv, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    fewer, first = result["fewer_gpus"], result["layouts"][0]["seconds_per_step"]
    assert fewer["world_size"] in (1, 2, 4)
    alone = search_layouts(load_config(path), fewer["world_size"], named_hardware("H100"))
    own = alone["layouts"][0]["seconds_per_step"]
    assert fewer["seconds_per_step"] == pytest.approx(own)
    assert fewer["of_the_time"] == pytest.approx(own / first)
    assert main(argv) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"advice: {result['advice'][0]}"


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--gpus", "4"], "--search needs --gpus N, and --memory GIB or --gpu NAME"),
        (["--gpu", "H100"], "--search needs --gpus N, and"),
        (["--gpus", "4", "--gpu", "H100", "data.train=nowhere"], "is not on this machine"),
        (["--gpus", "4", "--gpu", "H100", "model.dtype=float32"], "add model.dtype=bfloat16"),
        (["--gpus", "1", "--memory", "6", "data.row_capacity=40000000"], "none of 4 layouts of 1"),
    ],
)
def test_searches_that_are_refused(written, capsys, flags, message):
    assert main(["plan", "--search", "--config", written(), *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_group_that_does_not_fit_its_row_is_no_layout(written, data):
    """Half of the capacity is too small for the longest tree of the set."""
    config = load_config(written())
    search = LayoutSearch.of_config(config, 2, named_hardware("H100"))
    small = row_sizes(config)[0]
    assert search.rows_of(small) is None and search.estimate(small) is None
    with pytest.raises(InputError, match=r"data\.row_capacity is 60"):
        plan_run(small, 2)
