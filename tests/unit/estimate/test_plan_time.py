"""`plan --gpu`: what fits, how long it takes, what sharing saves, and the advice."""

from __future__ import annotations

import json
import re

import pytest

from megatron_prefix.__main__ import main
from megatron_prefix.config import load_config
from megatron_prefix.errors import InputError
from megatron_prefix.estimate import named_hardware, plan_run
from megatron_prefix.estimate.advice import fill_advice, recompute_advice, rows_for_bubble
from megatron_prefix.testing import write_random_set

SIZES = {"num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_random_set(tmp_path_factory.mktemp("plan") / "set", 0, 12)


@pytest.fixture
def config(tmp_path, data):
    def write(**sections) -> str:
        settings = {
            "data": {"train": data, "row_capacity": 120, "global_batch_size": 4},
            "model": {**SIZES, "dtype": "bfloat16", **sections.pop("model", {})},
            "optimizer": {"lr": 1e-3},
            "train": {"epochs": 2},
            "logging": {"output": str(tmp_path / "run")},
        }
        path = tmp_path / "config.yaml"
        path.write_text(json.dumps(settings | sections))
        return str(path)

    return write


def planned(path: str, world_size: int = 1, gpu: str | None = "H100", **flags) -> dict:
    return plan_run(load_config(path), world_size, named_hardware(gpu, **flags))


def test_time_of_a_run(config):
    plan = planned(config())
    time, sharing = plan["time"], plan["time"]["sharing"]
    assert time["steps"] == plan["data"]["num_steps"] == 6
    assert time["hours"] == pytest.approx(6 * time["seconds_per_step"] / 3600)
    assert sum(time["seconds"].values()) == pytest.approx(time["seconds_per_step"])
    assert sharing["hours"] == pytest.approx(time["hours"]) and sharing["is_on"]
    costs = plan["data"]["sharing"]
    none, tree = costs["none"]["forward_flops"], costs["tree"]["forward_flops"]
    # padding aside, compute and reference are in proportion to operations; the optimizer is not
    saved = sharing["saved_share"]
    assert 0 < saved < 1 - tree / none + 0.02
    tokens = plan["data"]["executed_tokens_per_step"]
    assert time["tokens_per_second"] == pytest.approx(tokens / time["seconds_per_step"])
    two = planned(config(), 2)["time"]
    assert two["gpu_hours"] == pytest.approx(2 * two["hours"])


def test_what_sharing_would_save(config, data):
    off = {"train": data, "row_capacity": 120, "global_batch_size": 4, "sharing": "none"}
    plan = planned(config(data=off))
    time = plan["time"]
    assert not time["sharing"]["is_on"] and time["sharing"]["mode"] == "tree"
    assert time["hours"] == pytest.approx(time["sharing"]["hours_without"])
    assert time["sharing"]["saved_hours"] > 0


def test_a_faster_gpu_and_a_higher_mfu(config):
    path = config()
    seconds = {gpu: planned(path, gpu=gpu)["time"]["seconds_per_step"] for gpu in ("A100", "H100")}
    assert seconds["H100"] < seconds["A100"]
    assert planned(path, mfu=0.9)["time"]["seconds_per_step"] < seconds["H100"]


def test_whether_it_fits(config):
    plan = planned(config(), gpu=None, memory_gib=80)
    fit = plan["fit"]
    assert fit["usable_gib"] == pytest.approx(80 * 0.94 - 4) and fit["fits"]
    assert fit["margin_gib"] == pytest.approx(fit["usable_gib"] - fit["needed_gib"])
    assert plan["time"] is None and not any("time" in text for text in plan["missing"])
    large = config(model={"hidden_size": 8192, "num_layers": 80, "ffn_hidden_size": 28672})
    fit = planned(large, gpu="A100")["fit"]
    assert not fit["fits"] and fit["margin_gib"] < 0


def test_the_text_and_the_json(config, capsys):
    path = config()
    assert main(["plan", "--config", path, "--gpus", "2", "--gpu", "h200"]) == 0
    out = capsys.readouterr().out
    for words in ("2 processes", "fits: ", "to spare", "6 steps on H200", "GPU-hours", "saves"):
        assert words in out
    assert re.search(r"^[\d.e-]+ seconds, .* GPU-hours;", out, re.M), "a short run in seconds"
    assert "not a measurement" in out and "advice: loss.reference: model takes" in out
    assert main(["plan", "--config", path, "--gpu", "H200", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {"fit", "time", "advice"} <= report.keys() and report["time"]["mfu"] == 0.5


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--gpu", "V100"], "is not known: give one of H100, H200, B200, A100"),
        (["--mfu", "0.4"], "no GPU is named"),
        (["--gpu", "H100", "--mfu", "1.5"], "give 0.01 to 1"),
        (["--gpu", "H100", "--mfu", "nan"], "give 0.01 to 1"),
        (["--memory", "5"], "give 6 to 4096"),
        (["--gpus", "0"], "at least 1"),
        (["--gpu", "H100", "model.dtype=float32"], "add model.dtype=bfloat16"),
    ],
)
def test_values_that_are_refused(config, capsys, flags, message):
    path = config()
    overrides = [flag for flag in flags if "=" in flag]
    rest = [flag for flag in flags if "=" not in flag]
    assert main(["plan", "--config", path, *overrides, *rest]) == 2
    assert message in capsys.readouterr().err


def test_time_needs_model_and_data(config, tmp_path):
    nowhere = {"train": str(tmp_path / "no"), "row_capacity": 120, "global_batch_size": 4}
    plan = planned(config(data=nowhere))
    assert plan["time"] is None and plan["missing"][-1].startswith("time: it needs")


def test_advice_on_the_batch(config):
    stages = {"pipeline_model_parallel_size": 4}
    plan = planned(config(parallel=stages), 4, gpu=None)
    rows = plan["data"]["rows_per_rank"]
    (line,) = (text for text in plan["advice"] if "small for the pipeline" in text)
    assert f"{rows} rows per rank" in line and "30 rows per rank (10 %)" in line
    assert f"data.global_batch_size = {-(-4 * 30 // rows)}" in line
    plan = planned(config(), 8, gpu=None)
    assert any(text.startswith("4 groups per step for 8 data-p") for text in plan["advice"])


def test_rows_for_a_bubble(config):
    stages = {"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 5}
    path = config(model={"num_layers": 20}, parallel=stages)
    assert rows_for_bubble(load_config(path).parallel, 0.1) == 8


def test_advice_on_rows_recomputation_and_reference(config, data):
    wide = {"train": data, "row_capacity": 1000, "global_batch_size": 1}
    plan = planned(config(data=wide, model=FULL))
    text = "\n".join(plan["advice"])
    assert "of 1,000 tokens" in text and "lower data.row_capacity" in text
    assert "nothing needs to be recomputed: without it a rank needs 0.0 of 70.3 GiB" in text
    assert "in each of 2 epochs" in text
    without = planned(config(data=wide, loss={"loss_type": "simpo"}))["advice"]
    assert not any("reference" in line or "recomputed" in line for line in without)
    assert not [*recompute_advice(71.0, 70.3, None)]


def test_short_rows_are_told_what_changes_them(config):
    """A capacity that the longest row fills is not lowered to that row."""
    settings = load_config(config())
    capacity = settings.data.row_capacity
    mean = {"tokens_per_row": 0.5 * capacity}
    (line,) = fill_advice(settings, {**mean, "longest_row": capacity - 1})
    assert "lower data.row_capacity to the longest row, or raise" in line
    (line,) = fill_advice(settings, {**mean, "longest_row": capacity})
    assert "lower data.row_capacity, down to the tokens of the largest group, or raise" in line
    assert not [*fill_advice(settings, {"tokens_per_row": capacity, "longest_row": capacity})]


def test_a_name_without_gpu_is_no_hardware():
    assert named_hardware(None) is None
    with pytest.raises(InputError, match="--gpu is 'h300'"):
        named_hardware("h300")
