"""Seconds of a step by the formulas of `plan`, against small real runs on this CPU.

Calibrated once for each number of processes: operations per second, so that the first run of one
process and the first of two have their measured time. The rate at which two processes send is
measured by an all-reduce. Everything else is formula: each further run is predicted, and the ratio
to the first run of as many processes is compared with the measured one. A time is the mean of a
run's steps but the first. The runs take turns, and the least of a run's times counts, which makes
other loads of the machine matter less.

    python tools/bench_plan.py --data build/hh --steps 6
    python tools/bench_plan.py --data build/hh --processes 1    # a part, as table plan_1
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch
import torch.utils.benchmark
from bench_common import ROOT, publish

from megatron_prefix.config import Config, load_config
from megatron_prefix.estimate.data_costs import KnownModel, data_plan, planned_sampler
from megatron_prefix.estimate.hardware import Hardware
from megatron_prefix.estimate.known import known_dataset, with_adapters
from megatron_prefix.estimate.planned_run import PlannedRun
from megatron_prefix.estimate.run_time import step_work
from megatron_prefix.estimate.step_time import StepWork, step_time
from megatron_prefix.estimate.traffic import LINK_EFFICIENCY
from megatron_prefix.objectives import check
from megatron_prefix.platform.gpus import Gpu

SIZES = {  # by the number of processes: larger products for two, which each compute half of them
    1: {"num_layers": 4, "hidden_size": 512, "ffn_hidden_size": 2048, "num_attention_heads": 8},
    2: {"num_layers": 2, "hidden_size": 1024, "ffn_hidden_size": 4096, "num_attention_heads": 8},
}
CASES = {  # processes, name: sections on top of the base
    (1, "sharing tree, no reference"): {"loss": {"loss_type": "simpo"}},
    (1, "sharing none"): {"loss": {"loss_type": "simpo"}, "data": {"sharing": "none"}},
    (1, "reference model"): {},
    (1, "all recomputed"): {
        "loss": {"loss_type": "simpo"},
        "model": {"recompute_granularity": "full", "recompute_method": "uniform"}
        | {"recompute_num_layers": 1},
    },
    (1, "twice the layers"): {"loss": {"loss_type": "simpo"}, "model": {"num_layers": 8}},
    (1, "adapters"): {"loss": {"loss_type": "simpo"}, "lora": {"target_modules": "all-linear"}},
    (2, "DP 2"): {"loss": {"loss_type": "simpo"}},
    (2, "TP 2"): {
        "loss": {"loss_type": "simpo"},
        "parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    },
    (2, "PP 2"): {
        "loss": {"loss_type": "simpo"},
        "parallel": {"pipeline_model_parallel_size": 2},
    },
    (2, "CP 2"): {"loss": {"loss_type": "simpo"}, "parallel": {"context_parallel_size": 2}},
}
SEND = """
import time, torch, torch.distributed as dist
dist.init_process_group("gloo")
x = torch.zeros(2**20)
times = []
for _ in range(12):
    dist.barrier()
    start = time.perf_counter()
    dist.all_reduce(x)
    times.append(time.perf_counter() - start)
if dist.get_rank() == 0:
    print(x.numel() * 4 / min(times))  # each of two ranks sends as many bytes as it has
dist.destroy_process_group()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="a data set that build wrote")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2, help="times that each run is repeated")
    parser.add_argument("--groups", type=int, default=8, help="groups per step")
    parser.add_argument("--capacity", type=int, default=1024, help="tokens per row")
    parser.add_argument("--processes", type=int, choices=(1, 2), help="only runs of so many")
    args = parser.parse_args()
    cases = [case for case in CASES if case[0] == (args.processes or case[0])]
    times: dict[tuple[int, str], list[float]] = {case: [] for case in cases}
    rows: list[dict[str, object]] = []
    first: dict[int, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        cpu = this_cpu(float(called(2, ["-c", SEND], Path(scratch)).split()[-1]))
        paths = {case: Path(scratch) / f"{index}.json" for index, case in enumerate(cases)}
        for _ in range(args.rounds):
            for case, path in paths.items():
                times[case].append(step_seconds(args, case, path))
        for (processes, name), path in paths.items():
            measured = min(times[processes, name])
            run, work = planned(load_config(path), processes)
            if processes not in first:
                rate = calibrated(run, work, cpu, measured)
                first[processes] = (rate, measured)
            rate, of_first = first[processes]
            predicted = seconds(run, work, replace(cpu, bf16_flops=rate))
            ratio, expected = measured / of_first, predicted / of_first
            rows.append(
                {
                    "processes": processes,
                    "run": name,
                    "measured s": f"{measured:.3f}",
                    "predicted s": f"{predicted:.3f}",
                    "measured ratio": f"{ratio:.3f}",
                    "predicted ratio": f"{expected:.3f}",
                    "predicted / measured": f"{expected / ratio:.3f}",
                }
            )
            print(rows[-1], flush=True)
    table = f"plan_{args.processes}" if args.processes else "plan"
    publish(table, rows, __doc__.split("\n\n")[1].replace("\n", " "))


def step_seconds(args: argparse.Namespace, case: tuple[int, str], path: Path) -> float:
    """Mean seconds of a run's steps but the first; its configuration is written to `path`."""
    processes, _ = case
    with tempfile.TemporaryDirectory() as output:
        path.write_text(json.dumps(settings(args, processes, Path(output), CASES[case])))
        called(processes, ["-m", "megatron_prefix", "train", "--config", str(path)], Path(output))
        lines = [json.loads(x) for x in (Path(output) / "metrics.jsonl").open()]
    return fmean(line["step_time_s"] for line in lines[1:])


def settings(args: argparse.Namespace, processes: int, output: Path, sections: dict) -> dict:
    """The configuration of a run."""
    base: dict[str, dict] = {
        "data": {"train": str(Path(args.data).resolve()), "row_capacity": args.capacity}
        | {"global_batch_size": args.groups},
        "model": SIZES[processes],
        "optimizer": {"lr": 1e-5},
        "train": {"steps": args.steps},
        "logging": {"output": str(output)},
    }
    names = [*base, *(name for name in sections if name not in base)]
    return {name: base.get(name, {}) | sections.get(name, {}) for name in names}


def called(processes: int, arguments: list[str], folder: Path) -> str:
    """Output of Python with these arguments, under torchrun if there are several processes."""
    folder.mkdir(parents=True, exist_ok=True)
    argv = [sys.executable, *arguments]
    if processes > 1:
        if arguments[0] == "-c":
            script = folder / "send.py"
            script.write_text(arguments[1])
            arguments = [str(script)]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        argv = [sys.executable, *launcher, *arguments]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{argv}\n{done.stderr[-2000:]}")
    return done.stdout


def this_cpu(sent: float) -> Gpu:
    """A device that sends `sent` bytes per second; its memory is measured here, its operations per
    second are calibrated."""
    source = torch.zeros(2**24)
    target = torch.empty_like(source)
    timer = torch.utils.benchmark.Timer("target.copy_(source)", globals=locals())
    moved = 2 * source.numel() * 4 / timer.timeit(5).mean
    link = sent / LINK_EFFICIENCY
    return Gpu(
        name="this CPU",
        bf16_flops=1.0,
        memory_gib=1,
        memory_bandwidth=moved / LINK_EFFICIENCY,
        nvlink=link,
        network=link,
    )


def planned(config: Config, processes: int) -> tuple[PlannedRun, StepWork]:
    """The run, and the work of its steps."""
    objective = check(config.loss, config.model.kind)
    dataset, sizes = known_dataset(config, []), config.model.sizes()
    assert dataset is not None and sizes is not None
    known = with_adapters(config, KnownModel(sizes, dataset.vocab_size), [])
    assert known is not None
    parallel = config.parallel
    ranks = processes // (
        parallel.tensor_model_parallel_size
        * parallel.pipeline_model_parallel_size
        * parallel.context_parallel_size
    )
    data = data_plan(config, planned_sampler(config, objective, dataset, ranks, known), known)
    mode = config.data.sharing
    run = PlannedRun(config, objective, known, processes, 0, data["rows_per_rank"])
    return run, step_work(data, mode, mode, parallel)


def seconds(run: PlannedRun, work: StepWork, cpu: Gpu) -> float:
    """What the formulas say of a step."""
    job = run.job(Hardware(memory_gib=1, mfu=1.0, gpu=cpu))
    assert job is not None
    return step_time(job, run.config.parallel, work).total


def calibrated(run: PlannedRun, work: StepWork, cpu: Gpu, measured: float) -> float:
    """Operations per second with which the run takes the measured time."""
    low, high = 1e8, 1e14
    for _ in range(60):
        middle = (low * high) ** 0.5
        if seconds(run, work, replace(cpu, bf16_flops=middle)) > measured:
            low = middle
        else:
            high = middle
    return high


if __name__ == "__main__":
    main()
