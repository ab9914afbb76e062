"""The command `plan`: what it prints with and without the model and the data."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from torch.distributed.checkpoint import FileSystemReader

from megatron_prefix.__main__ import main
from megatron_prefix.config import load_config
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.estimate.planning import plan_run, sharing_advice
from megatron_prefix.testing import write_random_set

SIZES = {"num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_random_set(tmp_path_factory.mktemp("plan") / "set", 0, 12)


def config(folder, prefix: str, **sections) -> str:
    settings = {
        "data": {"train": prefix, "row_capacity": 120, "global_batch_size": 4},
        "model": SIZES,
        "optimizer": {"lr": 1e-3},
        "train": {"epochs": 1},
        "logging": {"output": str(folder / "run")},
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(settings | sections))
    return str(path)


def plan(capsys, *args) -> tuple[int, str, str]:
    code = main(["plan", "--config", *map(str, args)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_everything_is_known(data, tmp_path, capsys):
    parallel = {"pipeline_model_parallel_size": 2}
    path = config(tmp_path, data, parallel=parallel)
    code, out, _ = plan(capsys, path, "--world-size", 4, "--json")
    report = json.loads(out)
    assert code == 0 and report["missing"] == [] and report["data_parallel_size"] == 2
    stages = report["memory"]["stages"]
    assert len(stages) == 2 and all(
        stage["total"] == sum(v for k, v in stage.items() if k != "total") for stage in stages
    )
    assert stages[0]["reference"] == stages[0]["weights"] > 0
    rows = report["pipeline"]["rows_per_rank"]
    assert report["pipeline"]["bubble"] == 1 / rows
    dataset = PreferenceDataset(data)
    steps = report["data"]["steps_read"]
    assert (steps, report["data"]["groups_per_step"]) == (3, 4)
    for mode, cost in report["data"]["sharing"].items():  # the three steps are the whole data set
        assert cost["tokens"] * steps == pytest.approx(dataset.manifest["tokens"][mode])
    assert report["data"]["pairs_per_step"] * steps == len(dataset.pair_weights)
    assert report["verdict"].startswith("sharing pays on this data: data.sharing: tree takes 0.")
    code, out, _ = plan(capsys, path, "--world-size", 4)
    assert code == 0 and "stage 0" in out and "pipeline bubble" in out and report["verdict"] in out
    assert f"steps: {report['data']['num_steps']:,}\n" in out


def test_repeated_tokens_of_trees_in_parts(data, tmp_path, capsys):
    capacity = int(PreferenceDataset(data).response_lengths.max())
    split = {"train": data, "global_batch_size": 4, "row_capacity": capacity, "oversized": "split"}
    path = config(tmp_path, data, data=split)
    report = plan_run(load_config(path))["data"]
    tokens = PreferenceDataset(data).manifest["tokens"]["tree"]
    repeated = report["repeated_tokens_per_step"]
    assert repeated > 0 and report["divided_steps"] == 1.0
    assert report["sharing"]["tree"]["tokens"] == pytest.approx(tokens / 3 + repeated)
    assert report["longest_row"] <= capacity
    code, out, _ = plan(capsys, path)
    assert code == 0 and f"split repeats {repeated:,.1f} tokens per step; 100 % of the" in out


@pytest.mark.parametrize(
    ("is_distributed", "dtype", "lora"),
    [
        (False, "float32", None),
        (True, "float32", None),
        (False, "bfloat16", None),
        (True, "bfloat16", {"r": 2}),
    ],
)
def test_a_save_in_the_background_needs_host_memory(
    data, tmp_path, capsys, is_distributed, dtype, lora
):
    """As many bytes as the checkpoint has, if one process writes all of it."""
    path = config(
        tmp_path,
        data,
        parallel={"use_distributed_optimizer": is_distributed},
        model={**SIZES, "dtype": dtype},
        train={"steps": 1, "async_save": True, "save": str(tmp_path / "saved")},
        **({"lora": lora} if lora else {}),
    )
    (stage,) = plan_run(load_config(path))["memory"]["stages"]
    assert main(["train", "--config", path]) == 0
    entries = FileSystemReader(tmp_path / "saved" / "iter_0000001").read_metadata()
    tensors = [x for x in entries.state_dict_metadata.values() if hasattr(x, "size")]
    saved = sum(x.size.numel() * x.properties.dtype.itemsize for x in tensors)
    assert stage["host_copy"] == pytest.approx(saved, rel=1e-3)
    _, out, _ = plan(capsys, path)
    assert "in host memory: copy for a save in the background" in out


def test_shadow_steps_need_host_memory(data, tmp_path, capsys):
    """A share of the gradients of each rank, twice if they are compared without auxiliary loss."""
    train = {"steps": 3, "shadow_steps": 1}
    parallel = {"use_distributed_optimizer": True}
    plain = plan_run(load_config(config(tmp_path, data, parallel=parallel)), 2)["memory"]
    path = config(tmp_path, data, parallel=parallel, train=train)
    report = plan_run(load_config(path), 2)["memory"]
    (stage,), (before,) = report["stages"], plain["stages"]
    assert stage["host_gradients"] == before["gradients"] // 2
    assert stage["total"] == before["total"] and "host_gradients" not in before
    _, out, _ = plan(capsys, path)
    assert "in host memory: gradients of shadow steps" in out


def test_interleaved_stages_take_rows_in_multiples(data, tmp_path):
    interleaved = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
    report = plan_run(load_config(config(tmp_path, data, parallel=interleaved)))
    plain = plan_run(load_config(config(tmp_path, data)))
    rows = plain["data"]["rows_per_rank"]
    assert report["data"]["rows_per_rank"] == rows + rows % 2
    assert report["pipeline"]["bubble"] == 1 / (2 * (rows + rows % 2))


def test_what_is_not_here_is_named(data, tmp_path, capsys):
    path = config(tmp_path, str(tmp_path / "nowhere"), model={"hf": str(tmp_path / "model")})
    code, out, _ = plan(capsys, path)
    assert code == 0
    assert "data.train = " in out and "model.hf = " in out and out.count("not known here") == 2
    code, out, _ = plan(capsys, config(tmp_path, str(tmp_path / "nowhere")), "--json")
    report = json.loads(out)
    assert report["memory"] is None and "vocabulary" in report["missing"][1]
    code, out, _ = plan(capsys, config(tmp_path, data, model={"hf": "no/model"}), "--json")
    report = json.loads(out)
    assert report["verdict"].endswith("of the tokens of none") and report["parameters"] is None


def test_sizes_of_a_hugging_face_directory(data, tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(
            {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 8, "vocab_size": 300}
            | {"intermediate_size": 16, "num_attention_heads": 2, "rms_norm_eps": 1e-5}
        )
    )
    path = config(tmp_path, data, model={"hf": str(tmp_path)})
    report = plan_run(load_config(path))
    assert report["parameters"]["embedding"] == 2400 and report["world_size"] == 1


def test_padded_micro_batches_count_their_padding(data, tmp_path):
    unpacked = {"train": data, "packing": False, "micro_batch_size": 2, "global_batch_size": 4}
    path = config(tmp_path, data, data={**unpacked, "sharing": "none"})
    report = plan_run(load_config(path))
    longest = int(PreferenceDataset(data).response_lengths.max())
    assert report["memory"]["row_tokens"] == 2 * longest
    assert report["verdict"].startswith("sharing would pay on this data, and is off")


@pytest.mark.parametrize(
    "size, parallel, message",
    [
        (3, {"tensor_model_parallel_size": 2}, "3 processes .* a multiple of 2"),
        (0, {}, "at least 1"),
        (4, {"tensor_model_parallel_size": 8}, "num_attention_heads = 4 is not a multiple"),
    ],
)
def test_layouts_that_do_not_divide_are_refused(data, tmp_path, capsys, size, parallel, message):
    path = config(tmp_path, data, parallel=parallel)
    code, _, err = plan(capsys, path, "--world-size", size)
    assert code == 2
    assert re.search(message, err)


def test_a_plan_needs_neither_torch_nor_megatron(data, tmp_path):
    code = (
        "import sys; from megatron_prefix.config import load_config\n"
        "from megatron_prefix.estimate import plan_run\n"
        f"assert plan_run(load_config({config(tmp_path, data)!r}))['memory']\n"
        "assert not {'torch', 'megatron.core'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_advice_on_sharing():
    def costs(tree: float) -> dict:
        none = {"tokens": 10.0, "forward_flops": 100.0}
        return {"none": none, "tree": {"tokens": 1.0, "forward_flops": tree}}

    assert sharing_advice("tree", costs(50.0)).endswith("tree takes 0.50 of the operations of none")
    assert sharing_advice("tree", costs(96.0)).startswith("sharing hardly pays")
    assert sharing_advice("none", costs(50.0)).startswith("sharing would pay")
