"""Steps of adapters compared with the training of all weights, and the extra cost of adapters.

    OMP_NUM_THREADS=1 python tools/bench_lora.py training
    OMP_NUM_THREADS=1 python tools/bench_lora.py adapters
    OMP_NUM_THREADS=1 python tools/bench_lora.py adapters --shape wide

`training`: adapters on all linear layers against all weights, shared and unshared, each with
`reference: model`. The four take turns step by step. Memory is counted, not read from the system:
weights, gradients and optimizer state, and the most that a step allocates in addition.

`adapters`: a whole step with adapters over the same step with adapters off. With adapters off the
base is frozen as before, its input has a gradient, and so forward and backward go through the same
layers: only A x, B A x, their gradients and the adapters' optimizer are left out. No reference is
computed, because it would be the same in both.

A figure is a ratio of two times of the same round: the median over rounds. A time is the
processor time of this process, on CUDA the wall clock. The FLOP model is that of `plan`
(megatron_prefix/estimate/adapters.py).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from bench_common import Results
from bench_model import LLAMA_1B, LR, SIZES
from bench_sets import tree_median, write_like
from bench_shapes import SETS
from torch.profiler import ProfilerActivity, profile

from megatron_prefix.config import Config, parse_config
from megatron_prefix.data.steps import MicroBatch
from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.distributed import World, open_session
from megatron_prefix.estimate import ForwardFlops, adapter_flops, forward_flops, training_flops
from megatron_prefix.model.adapters import without_adapters
from megatron_prefix.trackers import Trackers
from megatron_prefix.train import training_sampler
from megatron_prefix.train.setup import prepare_trainer
from megatron_prefix.train.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model, its data, and how much more than the FLOP model adapters may cost."""

    model: dict
    tokens: int
    """About how many tokens of trees a step has."""
    row_capacity: int
    bound: float
    """Upper limit of the ratio of times."""
    is_over_model: bool
    """Whether `bound` is multiplied by the FLOP model's ratio."""


SMALL = SIZES["small"]
VOCAB = SMALL.vocab_size
WIDE = {**LLAMA_1B, "num_layers": 1, "make_vocab_size_divisible_by": 1}
SHAPES = {
    "small": Shape(
        model=SMALL.model,
        tokens=SMALL.tokens,
        row_capacity=SMALL.row_capacity,
        bound=1.10,
        is_over_model=True,
    ),
    "wide": Shape(model=WIDE, tokens=1500, row_capacity=512, bound=1.08, is_over_model=False),
}
"""`wide` is one layer of Llama-3.2-1B: hidden size 2048."""
SHARINGS = {"unshared": "none", "shared": "tree"}
TRAINED = {"all weights": False, "adapters": True}
WARM_UP = 1
"""Rounds that are not counted."""


def seconds(work: Callable[[], object]) -> float:
    """Time of `work`: of the processor, or on CUDA the wall clock until the device is done."""
    if not torch.cuda.is_available():
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def most_allocated(work: Callable[[], object]) -> int:
    """The most bytes that are allocated at one time by `work` and not yet freed. Memory from before
    it does not count, nor does its release."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with tempfile.TemporaryDirectory() as name:
        trace = Path(name) / "trace.json"
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            work()
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    sizes = [(e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]"]
    assert sizes, "the profiler reported no allocation"
    return int(np.cumsum([size for _, size in sorted(sizes, key=lambda x: x[0])]).max())


def kept_bytes(run: Trainer) -> dict[str, int]:
    """Bytes that a run has between its steps: weights of policy and reference, gradient buffers,
    optimizer state."""
    chunks = [*run.policy.chunks, *getattr(run.reference, "chunks", [])]
    weights = [x for chunk in chunks for x in chunk.parameters()]
    buffers = [
        buffer.grad_data
        for chunk in run.policy.chunks
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
    ]
    state = []
    for part in run.policy.optimizer.chained_optimizers:
        for parameter, own in part.optimizer.state.items():
            state += [parameter, *(x for x in own.values() if isinstance(x, torch.Tensor))]
    seen: set[int] = set()

    def total(tensors: list[torch.Tensor]) -> int:
        new = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
        size = sum(nbytes for pointer, nbytes in new.items() if pointer not in seen)
        seen.update(new)
        return size

    return {"weights": total(weights), "gradients": total(buffers), "optimizer": total(state)}


def forward_of(run: Trainer, rows: list[MicroBatch]) -> ForwardFlops:
    """Operations of one forward pass over rows, the adapters' included."""
    sizes, lora = run.initial.sizes, run.initial.lora
    vocab_size = run.sampler.dataset.vocab_size
    flops = sum((forward_flops(sizes, vocab_size, row) for row in rows), ForwardFlops())
    if lora is None:
        return flops
    tokens = sum(len(row.tokens) for row in rows)
    return replace(flops, adapters=adapter_flops(lora, sizes, tokens))


def config_of(
    shape: Shape, prefix: str, folder: str, groups: int, args: argparse.Namespace, **sections: dict
) -> Config:
    return parse_config(
        {
            "data": {
                "train": prefix,
                "row_capacity": shape.row_capacity,
                "global_batch_size": groups,
                **sections.pop("data", {}),
            },
            "model": {**shape.model, "dtype": args.dtype},
            "optimizer": {"lr": LR},
            "train": {"steps": 10**6},
            "logging": {"output": folder},
            **sections,
        }
    )


def with_sharing(run: Trainer, config: Config, world: World) -> Trainer:
    """The same policy and reference on the rows of another configuration."""
    sampler = training_sampler(config, run.objective, run.sampler.dataset, world)
    return replace(run, config=config, sampler=sampler, trackers=Trackers())


def measure_training(name: str, args: argparse.Namespace, scratch: str) -> list[dict]:
    """One row of the table for each of the four ways to train, on one data set."""
    shape = SHAPES[args.shape]
    groups = max(round(shape.tokens / tree_median(name)), 2)
    data = write_like(Path(scratch) / "set", name, groups * 4, VOCAB)
    runs: dict[str, Trainer] = {}
    lora = {"r": args.rank, "lora_alpha": args.rank}

    def configure(trained: str, sharing: str) -> Config:
        sections = {"lora": lora} if TRAINED[trained] else {}
        rows = {"sharing": SHARINGS[sharing]}
        folder = f"{scratch}/{trained}"
        return config_of(shape, data, folder, groups, args, data=rows, **sections)

    with open_session(configure("all weights", "shared")) as world:
        for trained in TRAINED:
            made = prepare_trainer(
                configure(trained, "unshared"), PreferenceDataset(data), None, world
            )
            runs[f"{trained}, unshared"] = made
            shared = configure(trained, "shared")
            runs[f"{trained}, shared"] = with_sharing(made, shared, world)
        times: dict[str, list[float]] = {mode: [] for mode in runs}
        flops = {mode: 0.0 for mode in runs}
        memory = {mode: 0 for mode in runs}
        for number in range(WARM_UP + args.rounds):
            for mode, run in runs.items():
                rows = run.sampler.micro_batches(run.sampler.step(run.step))
                own = seconds(run.train_step)
                if number >= WARM_UP:
                    times[mode].append(own)
                    forward = forward_of(run, rows)
                    flops[mode] += training_flops(forward, run.initial.lora, has_reference=True)
        for mode, run in runs.items():
            memory[mode] = most_allocated(run.train_step)
        kept = {mode: kept_bytes(run) for mode, run in runs.items()}
        for run in runs.values():
            run.close()
    return training_rows(name, times, flops, kept, memory)


def training_rows(
    name: str,
    times: dict[str, list[float]],
    flops: dict[str, float],
    kept: dict[str, dict[str, int]],
    memory: dict[str, int],
) -> list[dict]:
    """Lines of the table; ratios are over the first mode."""
    first = next(iter(times))
    rows = []
    for mode, own in times.items():
        ratios = np.array(own) / np.array(times[first])
        peak, of_first = (sum(kept[x].values()) + memory[x] for x in (mode, first))
        mib = {part: f"{size / 2**20:.1f}" for part, size in kept[mode].items()}
        rows.append(
            {
                "data": f"lengths of {name}",
                "trained": mode,
                "time over the first": f"{np.median(ratios):.3f}",
                "rounds": f"{ratios.min():.3f} to {ratios.max():.3f}",
                "FLOP model": f"{flops[mode] / flops[first]:.3f}",
                "peak memory over the first": f"{peak / of_first:.3f}",
                **{f"{part}, MiB": size for part, size in mib.items()},
                "a step in addition, MiB": f"{memory[mode] / 2**20:.1f}",
            }
        )
    return rows


def measure_adapters(args: argparse.Namespace, scratch: str) -> dict:
    """The row of one shape: a step with adapters over the same one with adapters off."""
    shape = SHAPES[args.shape]
    name = args.sets[0]
    groups = max(round(shape.tokens / tree_median(name)), 2)
    data = write_like(Path(scratch) / "set", name, groups, VOCAB)
    config = config_of(
        shape,
        data,
        f"{scratch}/run",
        groups,
        args,
        loss={"loss_type": "sigmoid", "reference": "none"},
        lora={"r": args.rank, "lora_alpha": args.rank},
    )
    with open_session(config) as world:
        run = prepare_trainer(config, PreferenceDataset(data), None, world)
        step = run.feed.step(0)

        def with_them() -> None:
            run.policy.gradients(step.batches, run.objective)
            run.policy.update()

        def without_them() -> None:
            with without_adapters(run.policy.chunks):
                run.policy.gradients(step.batches, run.objective)

        for _ in range(WARM_UP):
            with_them(), without_them()
        times = [(seconds(with_them), seconds(without_them)) for _ in range(args.rounds)]
        forward, lora = forward_of(run, step.rows), run.initial.lora
        run.close()
    on, off = np.array(times).T
    model = training_flops(forward, lora) / training_flops(replace(forward, adapters=0.0), lora)
    ratio, bound = float(np.median(on / off)), shape.bound * (model if shape.is_over_model else 1)
    return {
        "shape": args.shape,
        "layers": shape.model["num_layers"],
        "hidden size": shape.model["hidden_size"],
        "r": args.rank,
        "tokens per step": sum(len(row.tokens) for row in step.rows),
        "dtype": args.dtype,
        "time with / without": f"{ratio:.3f}",
        "rounds": f"{(on / off).min():.3f} to {(on / off).max():.3f}",
        "lowest with / lowest without": f"{on.min() / off.min():.3f}",
        "FLOP model": f"{model:.3f}",
        "bound": f"{bound:.3f}",
        "met": "yes" if ratio <= bound else "no",
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["training", "adapters"])
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument(
        "--sets", nargs="+", choices=list(SETS), default=["HH-RLHF"], help="lengths of drawn pairs"
    )
    parser.add_argument("--rank", type=int, default=16, help="r (default: 16)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--name", help="of the files under results", default=None)
    args = parser.parse_args()
    own = "lora" if args.part == "training" else f"lora_adapters_{args.shape}"
    args.name = args.name or f"{own}_{device}"
    return args


def main() -> None:
    args = arguments()
    warnings.filterwarnings("ignore", module=r"megatron\.core\..*")
    clock = "wall clock" if torch.cuda.is_available() else "processor time"
    notes = (
        f"Shape {args.shape}: {json.dumps(SHAPES[args.shape].model)}, vocabulary {VOCAB}, "
        f"{args.dtype}, rows of {SHAPES[args.shape].row_capacity} tokens; adapters of rank "
        f"{args.rank} on all linear layers. By {clock}; medians of {args.rounds} rounds, in turn."
    )
    results = Results(args.name, notes)
    with tempfile.TemporaryDirectory() as scratch:
        if args.part == "adapters":
            results.append(measure_adapters(args, scratch))
        else:
            for number, name in enumerate(args.sets):
                folder = Path(scratch) / str(number)
                folder.mkdir()
                results.append(*measure_training(name, args, str(folder)))
    results.finish()


if __name__ == "__main__":
    main()
