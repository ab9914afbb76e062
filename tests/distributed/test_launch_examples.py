"""Every launch example fits its model and nodes, and runs scaled down with its kinds of layout.

A layout with more kinds than four processes hold runs as two that have all of them together.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launch_recipes import (
    FILES,
    GPUS,
    LAUNCH,
    NUM_PARAMETERS,
    RECIPES,
    ROOT,
    alone,
    kinds_of,
    raw_config,
    scaled_down,
    smaller_layouts,
    write_model,
)
from runs import TIMEOUT_S, on_processes

from megatron_prefix.config import load_config
from megatron_prefix.errors import InputError
from megatron_prefix.estimate.planning import plan_run
from megatron_prefix.testing import write_random_set

USABLE_GIB = 70
"""Of an H100's 80 GB, without what CUDA, NCCL and fragmentation take."""
SAMPLE = {
    "8b/dpo.yaml": "tensor_model_parallel_size",
    "70b/dpo.yaml": "pipeline_model_parallel_size",
    "70b/reward.yaml": "pipeline_model_parallel_size",
    "long/dpo.yaml": "context_parallel_size",
    "moe/dpo.yaml": "expert_model_parallel_size",
}
SCRIPTS = sorted(path.name for path in LAUNCH.glob("*.s*"))


def test_every_example_is_known():
    assert FILES == sorted(str(path.relative_to(LAUNCH)) for path in LAUNCH.rglob("*.yaml"))
    assert sorted(SAMPLE) == FILES


def planned(recipe, folder: Path, nodes: int) -> dict:
    hf = write_model(folder / recipe.model, recipe.model)
    config = load_config(LAUNCH / recipe.file, [f"model.hf={hf}", *recipe.overrides])
    return plan_run(config, nodes * GPUS)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: f"{r.file} {r.nodes} {r.gib}")
def test_the_real_model_fits_its_nodes(recipe, tmp_path):
    plan = planned(recipe, tmp_path, recipe.nodes)
    counts = plan["parameters"]
    expected = NUM_PARAMETERS[recipe.model]
    if "reward" in recipe.file:
        expected -= counts["embedding"] - counts["head"]  # one score in place of logits
    assert sum(counts.values()) == expected
    memory = plan["memory"]
    most = memory["stages"][memory["fullest_stage"]]["total"] / 2**30
    assert most < USABLE_GIB and round(most, 1) == recipe.gib
    for override in recipe.overrides:
        assert override in (LAUNCH / recipe.file).read_text(encoding="utf-8")
    row = rf"\| `{re.escape(recipe.file)}` \| {recipe.nodes} \|.*\| {recipe.gib} \|"
    assert re.search(row, (LAUNCH / "README.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("file, nodes", [("70b/dpo.yaml", 3), ("70b/reward.yaml", 6)])
def test_nodes_that_the_layout_does_not_divide_are_refused(file, nodes, tmp_path):
    recipe = next(r for r in RECIPES if r.file == file)
    with pytest.raises(InputError, match=f"{nodes * GPUS} processes .* a multiple of 32"):
        planned(recipe, tmp_path, nodes)


def test_smaller_layouts_have_every_kind():
    for file in FILES:
        parallel = raw_config(file)["parallel"]
        layouts = smaller_layouts(parallel)
        assert set().union(*map(kinds_of, layouts)) == kinds_of(parallel), file
        assert all(kinds_of(layout) >= kinds_of(alone(parallel, "")) for layout in layouts)


class Scaled:
    """Scaled runs in a folder of their own each, on one data set."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = write_random_set(folder / "train", 0, 13)
        self.valid = write_random_set(folder / "valid", 1, 5)

    def commands(self, name: str, file: str, layout: dict, steps: int = 2) -> list[list[str]]:
        """Score if the example has a precomputed reference, and train."""
        folder = self.folder / name
        folder.mkdir()
        raw = scaled_down(file, layout, folder, self.data, self.valid, steps)
        config = folder / "config.yaml"
        config.write_text(json.dumps(raw))
        train = ["train", "--config", str(config)]
        if "ref_logps" not in raw["loss"]:
            return [train]
        return [["score", "--config", str(config), "--output", raw["loss"]["ref_logps"]], train]

    def check(self, name: str, file: str) -> None:
        lines = self.lines(name)
        losses = [line["loss"] for line in lines if "loss" in line]
        assert len(losses) == 2 and all(math.isfinite(x) for x in losses)
        if "reward" not in file:
            assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
        assert losses[1] != losses[0]
        if "valid" in raw_config(file)["data"]:
            assert sum("eval_loss" in line for line in lines) == 3
        assert self.step(name) == 2

    def lines(self, name: str) -> list[dict]:
        path = self.folder / name / "run" / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def step(self, name: str) -> int:
        saved = self.folder / name / "checkpoints"
        return int((saved / "latest_checkpointed_iteration.txt").read_text())


@pytest.fixture(scope="module")
def scaled(tmp_path_factory) -> Scaled:
    return Scaled(tmp_path_factory.mktemp("launch"))


def test_each_example_runs_with_one_of_its_kinds(scaled):
    """Two processes; the slow tests have the other kinds."""
    commands = []
    for file, size in SAMPLE.items():
        layout = alone(raw_config(file)["parallel"], size)
        commands += scaled.commands(f"sample {file.replace('/', ' ')}", file, layout)
    on_processes(2, scaled.folder, commands, TIMEOUT_S)
    for file in FILES:
        scaled.check(f"sample {file.replace('/', ' ')}", file)


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_each_example_runs_with_all_of_its_kinds(scaled, file):
    names, commands = [], []
    for i, layout in enumerate(smaller_layouts(raw_config(file)["parallel"])):
        names.append(f"{file.replace('/', ' ')} {i}")
        commands += scaled.commands(names[-1], file, layout)
    on_processes(4, scaled.folder, commands, 2 * TIMEOUT_S)
    for name in names:
        scaled.check(name, file)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_bash(script):
    assert len(SCRIPTS) == 3
    done = subprocess.run(["bash", "-n", LAUNCH / script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def dry_run(**env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", LAUNCH / "torchrun.sh", "train", "--config", "a b.yaml", "train.steps=3"],
        env={"PATH": os.environ["PATH"], "DRY_RUN": "1", **env},
        capture_output=True,
        text=True,
    )


def test_one_node_is_its_own_rendezvous():
    assert (
        dry_run().stdout.split()
        == (
            "python -m torch.distributed.run --standalone --nnodes=1 --nproc-per-node=8 "
            r"--max-restarts=0 -m megatron_prefix train --config a\ b.yaml train.steps=3"
        ).split()
    )


def test_several_nodes_have_their_rendezvous_on_one_of_them():
    env = {"NNODES": "4", "RDZV_HOST": "node7", "RUN_ID": "11-0", "GPUS_PER_NODE": "4"}
    words = dry_run(**env).stdout
    assert "--rdzv-backend=c10d --rdzv-endpoint=node7:29500 --rdzv-id=11-0" in words
    assert "--nnodes=4 --nproc-per-node=4" in words
    for name in ("RDZV_HOST", "RUN_ID"):
        refused = dry_run(**{key: value for key, value in env.items() if key != name})
        assert refused.returncode != 0 and name in refused.stderr


SRUN = """#!/usr/bin/env bash
echo "$@" >>"$LOG"
while [[ "$1" == --* ]]; do shift; done
tasks=()
trap 'kill -USR1 "${tasks[@]}"' USR1
for _ in $(seq "$SLURM_JOB_NUM_NODES"); do "$@" & tasks+=($!); done
worst=0
for task in "${tasks[@]}"; do
    while true; do
        wait "$task"; code=$?
        kill -0 "$task" 2>/dev/null || break
    done
    [ "$code" -gt "$worst" ] && worst=$code
done
exit "$worst"
"""
"""Starts a task for each node on this machine, and passes SIGUSR1 on to them."""
SCONTROL = """#!/usr/bin/env bash
[ "$1" = show ] && echo localhost || echo "scontrol $@" >>"$LOG"
"""


@pytest.mark.parametrize(
    ("action", "code", "starts"),
    [
        ("exit 0", 0, 1),
        ("exit 1", 1, 3),
        ('touch "$MEGATRON_PREFIX_REFUSED"; exit 1', 2, 1),
        ("[ $(wc -l <starts) -eq 2 ] && exit 0; exit 1", 0, 2),
    ],
)
def test_failures_are_started_again_and_wrong_input_is_not(tmp_path, action, code, starts):
    """A script that counts its starts takes the place of Python."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/bash\necho >>starts\n{action}\n")
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "MAX_RESTARTS": "2"}
    run = subprocess.run(
        ["bash", LAUNCH / "torchrun.sh", "train"], env=environment, cwd=tmp_path, timeout=60
    )
    assert run.returncode == code
    assert (tmp_path / "starts").read_text().count("\n") == starts


def test_the_reason_comes_last(tmp_path):
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/bash\necho the reason >"$MEGATRON_PREFIX_REFUSED"\necho traceback >&2\nexit 1\n'
    )
    python.chmod(0o755)
    run = subprocess.run(
        ["bash", LAUNCH / "torchrun.sh", "train"],
        env={**os.environ, "PYTHON": str(python)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (run.returncode, run.stderr) == (2, "traceback\nthe reason\n")


def slurm(folder: Path, nodes: int, arguments: list[str], **env: str) -> subprocess.Popen:
    """Start slurm.sbatch as Slurm would, with srun and scontrol of this test."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_ID": str(20000 + os.getpid() % 10000), "SLURM_JOB_NUM_NODES": str(nodes)}
    return subprocess.Popen(
        ["bash", "examples/launch/slurm.sbatch", *arguments],
        cwd=ROOT,
        env={
            **os.environ,
            **job,
            "SLURM_JOB_NODELIST": "node[1-2]",
            "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
            "LOG": str(folder / "log"),
            "PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
            **env,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_container_gets_the_working_directory(tmp_path):
    env = {"CONTAINER_IMAGE": "nvcr.io#nvidia/pytorch:TAG", "CONTAINER_MOUNTS": "/raid:/raid"}
    job = slurm(tmp_path, 1, ["train", "--config", "x"], DRY_RUN="1", GPUS_PER_NODE="8", **env)
    out, _ = job.communicate(timeout=60)
    assert job.returncode == 0 and "--standalone" in out, out
    log = (tmp_path / "log").read_text()
    assert f"--container-image=nvcr.io#nvidia/pytorch:TAG --container-mounts={ROOT}:{ROOT}" in log
    assert f",/raid:/raid --container-workdir={ROOT} bash" in log


@pytest.mark.slow
def test_a_job_at_its_time_limit_saves_requeues_itself_and_continues(scaled, tmp_path):
    """Two nodes of one process, which meet by c10d."""
    file, name = "8b/dpo.yaml", "requeued"
    layout = alone(raw_config(file)["parallel"], "tensor_model_parallel_size")
    score, train = scaled.commands(name, file, layout, steps=100_000)
    on_processes(2, scaled.folder, [score], TIMEOUT_S)
    train += ["train.eval_interval=null", "data.valid=null"]
    job = slurm(tmp_path, 2, train, GPUS_PER_NODE="1")
    deadline = time.monotonic() + TIMEOUT_S
    while len(scaled.lines(name)) < 3 and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    job.send_signal(signal.SIGUSR1)
    out, _ = job.communicate(timeout=TIMEOUT_S)
    assert job.returncode == 143, out[-3000:]
    assert "scontrol requeue" in (tmp_path / "log").read_text()
    stopped = scaled.step(name)
    assert 3 <= stopped == scaled.lines(name)[-1]["step"]
    again = slurm(tmp_path, 2, [*train, f"train.steps={stopped + 1}"], GPUS_PER_NODE="1")
    out, _ = again.communicate(timeout=TIMEOUT_S)
    assert again.returncode == 0, out[-3000:]
    assert f"after step {stopped}" in out and scaled.step(name) == stopped + 1
    assert (tmp_path / "log").read_text().count("scontrol requeue") == 1
