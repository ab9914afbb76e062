"""Builds that are killed or find no room, alone and with workers: nothing reads as complete."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import command, lines, refused, write_config
from test_disk_full import files_up_to

from megatron_prefix.data.build.builder import BuildOptions, build_dataset
from megatron_prefix.data.files.work_folder import building_folder
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.data.store.verify.checks import verify_dataset
from megatron_prefix.errors import InputError


@pytest.fixture
def records(tmp_path) -> Path:
    path = tmp_path / "in.jsonl"
    rows = [
        {"prompt": f"{i} " * 40, "chosen": f"{i} yes", "rejected": f"{i} no"} for i in range(900)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


BUILD = """
import sys, time
from megatron_prefix.data.build import chunks
from megatron_prefix.data.build.builder import BuildOptions, build_dataset

chunks.CHUNK = 64

def slowly(position, total, groups):
    print(groups, flush=True)
    time.sleep(0.02)

options = BuildOptions(workers=int(sys.argv[3]), merge_prompts=sys.argv[4] == "True")
build_dataset([sys.argv[1]], "bytes", sys.argv[2], options, progress=slowly)
"""


def children(pid: int) -> list[int]:
    """Processes whose parent is `pid`."""
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(stat[1]) == pid and stat[0] != "Z":
            pids.append(int(folder.name))
    return pids


def started(
    records: Path, output: Path, workers: int, merge_prompts: bool = False
) -> subprocess.Popen:
    """A build in a process of its own that has written some groups."""
    argv = [sys.executable, "-c", BUILD, str(records), str(output), str(workers)]
    argv.append(str(merge_prompts))
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    for _ in range(3):
        assert process.stdout.readline()
    return process


@pytest.mark.parametrize("merge_prompts", [False, True])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_build_leaves_no_data_set_no_process_and_is_cleared_away(
    records, tmp_path, workers, merge_prompts
):
    output = tmp_path / "out"
    process = started(records, output, workers, merge_prompts)
    below = children(process.pid)
    assert len(below) == (workers if workers > 1 else 0)
    process.kill()
    process.wait(30)
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in below) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in below)
    left = [path.name for path in tmp_path.iterdir() if path != records]
    kind = "merging" if merge_prompts else "building"
    assert len(left) == 1 and left[0].endswith(f".{process.pid}.{kind}")
    with pytest.raises(InputError, match="there is no data set"):
        PreferenceDataset(output)
    build_dataset([records], "bytes", output, BuildOptions(merge_prompts=merge_prompts))
    verify_dataset(PreferenceDataset(output))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *("in.jsonl", "out.bin", "out.idx", "out.json", "out.tree")
    ]


def test_an_interrupted_build_with_workers_leaves_nothing(records, tmp_path):
    process = started(records, tmp_path / "out", 2)
    below = children(process.pid)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) != 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in below)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_the_folder_of_a_living_build_stays(records, tmp_path):
    living = building_folder(tmp_path / "out").with_name(
        building_folder(tmp_path / "out").name.replace(f".{os.getpid()}.", f".{os.getppid()}.")
    )
    elsewhere = tmp_path / ".out.another-host.1.building"
    for folder in (living, elsewhere):
        folder.mkdir()
    build_dataset([records], "bytes", tmp_path / "out")
    assert living.is_dir() and elsewhere.is_dir()


@pytest.mark.parametrize("flags", [[], ["--merge-prompts"]])
@pytest.mark.parametrize("num_bytes", [10, 4000, 60000])
def test_a_full_disk_with_workers_leaves_nothing(records, tmp_path, capsys, num_bytes, flags):
    output = tmp_path / "made" / "set"
    argv = ["build", "--input", str(records), "--tokenizer", "bytes", "--output", str(output)]
    with files_up_to(num_bytes):
        code, message = command([*argv, "--workers", "2", *flags], capsys)
    assert code == 2 and "Traceback" not in message
    assert f"output {output} cannot be written" in message and "File too large" in message
    assert not output.parent.exists()


def test_a_full_disk_while_packing_or_merging_leaves_nothing(records, tmp_path, capsys):
    build_dataset([records], "bytes", tmp_path / "set", BuildOptions())
    before = sorted(tmp_path.iterdir())
    pack = ["pack", str(tmp_path / "set"), "--row-capacity", "4096", "--global-batch-size", "8"]
    with files_up_to(2000):
        refused([*pack, "--output", str(tmp_path / "plan")], capsys, "cannot be written")
        merge = ["merge", str(tmp_path / "set"), "--output", str(tmp_path / "merged")]
        refused(merge, capsys, "cannot be written")
    assert sorted(tmp_path.iterdir()) == before


def test_a_run_on_a_plan_is_the_run_without_it(dataset, other, tmp_path, capsys):
    """And another plan is refused by its own sizes, seed and data."""
    data = {"seed": 5, "global_batch_size": 3, "row_capacity": 8192}
    train = {"steps": None, "epochs": 2, "save": None, "load": None, "save_interval": None}
    argv = ["--row-capacity", "8192", "--global-batch-size", "3", "--epochs", "2"]
    plans = {}
    for name, source, seed in (("good", dataset, 5), ("seed", dataset, 6), ("data", other, 5)):
        plans[name] = str(tmp_path / name)
        made = ["pack", source, "--output", plans[name], *argv, "--seed", str(seed)]
        assert command(made, capsys)[0] == 0
    metrics = []
    for name, plan in (("alone", None), ("planned", plans["good"])):
        folder = tmp_path / f"run-{name}"
        path = write_config(
            tmp_path / f"{name}.json", dataset, folder, data={**data, "plan": plan}, train=train
        )
        assert command(["train", "--config", path], capsys)[0] == 0
        metrics.append(lines(folder))
    assert metrics[0] == metrics[1] and len(metrics[0]) == 6
    start = ["train", "--config", path]
    refused([*start, f"data.plan={plans['seed']}"], capsys, "data.seed is 5 and was 6")
    refused([*start, f"data.plan={plans['data']}"], capsys, "of 8 groups", "of 5")
    refused([*start, "data.global_batch_size=4"], capsys, "data.global_batch_size is 4", "3")
    refused([*start, "data.row_capacity=4096"], capsys, "data.row_capacity is 4096", "8192")
    refused([*start, f"data.plan={tmp_path}/absent"], capsys, "there are no packed steps")
