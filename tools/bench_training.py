"""Whole training steps, shared or not, packed or not, compared with the operations they need.

One policy and one optimizer run the same groups in every mode. The modes take turns step by step,
so that other load slows all of them. A figure is a ratio of two times of the same round: the
median over rounds. On CPU a time is the processor time of this process, which does not include
the load of other processes, and the wall clock's ratio is given in addition. On CUDA it is the
wall clock.

    python tools/bench_training.py --sets --data HH-RLHF=build/hh OpenAssistant=build/oasst
    python tools/bench_training.py --size 7b --num-layers 8 --sets           # one H100
    python tools/bench_training.py --size 7b --recompute full --sets --modes \\
        "packed, unshared, precomputed" "packed, shared, precomputed"
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from bench_common import NOT_RUN, Results, free_memory, unless_out_of_memory
from bench_model import MODES, SIZES, add_model, describe, make_config
from bench_runs import Built
from bench_sets import named, tree_median, write_like
from bench_shapes import SETS, SPREAD
from tqdm import tqdm

from megatron_prefix.config import Config
from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.estimate import ForwardFlops, forward_flops, training_flops
from megatron_prefix.estimate.vision import KnownVision
from megatron_prefix.objectives import check
from megatron_prefix.testing import saved_bytes

BASE, SHARED = "packed, unshared", "packed, shared"
COMPARED = ((BASE, SHARED), (f"{BASE}, precomputed", f"{SHARED}, precomputed"))
"""Pairs of modes that differ only in sharing. The summary shows the first pair that ran."""
ENVIRONMENT = ("OMP_NUM_THREADS", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")
"""Without the last two, glibc returns every large tensor to the system. Getting its pages again
costs more for longer rows."""


@dataclass
class Measured:
    """The rounds of one mode: seconds by both clocks, operations, executed tokens, memory."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    parts: ForwardFlops = field(default_factory=ForwardFlops)
    num_pairs: int = 0
    tokens: int = 0
    """Executed in the first round."""
    saved: int = 0
    """Bytes saved for backward in the first round, on CPU."""
    peak: int = 0
    """Most bytes allocated in a step, on CUDA."""
    step_peak: int = 0
    """The part that was not allocated before the step: activations and what backward adds."""

    def seconds(self) -> np.ndarray:
        return np.array(self.wall if torch.cuda.is_available() else self.processor)


def step_flops(
    rows: list[ForwardFlops],
    projected_again: float,
    config: Config,
    vision: KnownVision | None = None,
) -> float:
    """Operations of a step; `rows` are those of the policy's forward pass.

    Backward takes twice the forward pass of what is trained, a reference model takes one forward
    pass, and full recomputation one more of the layers. `projected_again` are the operations of
    the head's second pass (see `logps.py`).
    """
    parts = sum(rows, ForwardFlops())
    kind = config.model.kind
    has_reference = check(config.loss, kind).reference == "model"
    recomputed = config.model.recompute_granularity == "full"
    layers = recomputed * (parts.linear + parts.attention)
    step = training_flops(parts, None, kind, has_reference, vision)
    return step + layers + projected_again


def timed(run, measured: Measured, is_counted: bool, vision: KnownVision | None) -> bool:
    """Time one step of a run. Always True: the memory was enough."""
    on_cuda, before = torch.cuda.is_available(), 0
    if on_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    plan = run.sampler.step(run.step)
    rows = run.sampler.micro_batches(plan)
    wall, processor = time.perf_counter(), time.process_time()
    run.train_step()
    if on_cuda:
        torch.cuda.synchronize()
    if not is_counted:
        return True
    measured.wall.append(time.perf_counter() - wall)
    measured.processor.append(time.process_time() - processor)
    model, vocab_size = run.config.model, run.sampler.dataset.vocab_size
    pictures = () if vision is None else vision.pictures
    parts = [
        forward_flops(run.initial.sizes, vocab_size, row, model.kind, pictures) for row in rows
    ]
    in_chunks = [row.num_projected > model.lm_head_chunk_size for row in rows]
    again = sum(part.head for part, is_cut in zip(parts, in_chunks, strict=True) if is_cut)
    measured.flops.append(step_flops(parts, again, run.config, vision))
    measured.parts += sum(parts, ForwardFlops())
    measured.num_pairs += plan.num_pairs
    if on_cuda:
        peak = torch.cuda.max_memory_allocated()
        measured.peak = max(measured.peak, peak)
        measured.step_peak = max(measured.step_peak, peak - before)
    return True


def kept_for_backward(run) -> tuple[int, int]:
    """Bytes that the policy saves for backward of the first step's rows, one row at a time, and
    the tokens of these rows."""
    from megatron_prefix.engine.batch import to_device
    from megatron_prefix.engine.pictures import Pictures
    from megatron_prefix.model import unwrap

    model = unwrap(run.policy.chunks[0]).train()
    pictures = Pictures.of(run.sampler.dataset, model.config)
    total = tokens = 0
    for row in run.sampler.micro_batches(run.sampler.step(0)):
        batch = to_device(row, run.world.device, pictures=pictures)
        total += saved_bytes(
            lambda batch=batch: model(batch.tokens, None, None, **batch.model_inputs),
            model.parameters(),
        )
        tokens += len(row.tokens)
    return total, tokens


def mode_configs(
    args: argparse.Namespace, prefix: str, groups: int, scratch: str
) -> dict[str, Config]:
    """The configuration of each mode. The first step is a warm-up."""
    return {
        name: make_config(args, prefix, MODES[name], f"{scratch}/{name}", groups, 1 + args.rounds)
        for name in args.modes
    }


def measure(
    built: Built,
    configs: dict[str, Config],
    dataset: PreferenceDataset,
    vision: KnownVision | None = None,
) -> dict:
    """The rounds of every mode on one data set, without modes that need too much memory."""
    runs = built.runs(configs, {name: MODES[name] for name in configs}, dataset)
    by_mode = {name: Measured() for name in runs}
    if not torch.cuda.is_available():
        for name, run in runs.items():
            by_mode[name].saved, by_mode[name].tokens = kept_for_backward(run)
    try:
        for step in range(next(iter(runs.values())).num_steps):
            for name in list(by_mode):
                fits = unless_out_of_memory(
                    lambda n=name, s=step: timed(runs[n], by_mode[n], s > 0, vision)
                )
                if fits is None:
                    del by_mode[name]
    finally:
        for run in runs.values():
            run.close()
    return by_mode


def median(values) -> str:
    return f"{np.median(values):.3f}"


def summary(name: str, vocab_size: int, by_mode: dict[str, Measured]) -> dict:
    """A row of the table that shows what sharing alone saves."""
    pairs = [pair for pair in COMPARED if set(pair) <= by_mode.keys()]
    if not pairs:
        return {"data": name, "vocabulary": vocab_size, "note": NOT_RUN}
    none, tree = (by_mode[mode] for mode in pairs[0])
    measured, modelled = none.seconds() / tree.seconds(), np.divide(none.flops, tree.flops)
    reached = 100 * measured / modelled
    wall = 100 * np.divide(none.wall, tree.wall) / modelled
    return {
        "data": name,
        "vocabulary": vocab_size,
        "time none/tree": median(measured),
        "FLOP none/tree": median(modelled),
        "reached": f"{np.median(reached):.1f} %",
        "lowest round": f"{reached.min():.1f} %",
        "reached, wall clock": f"{np.median(wall):.1f} %",
        "head, share of FLOP": f"{100 * tree.parts.head / tree.parts.total:.1f} %",
        "attention, share of FLOP": f"{100 * tree.parts.attention / tree.parts.total:.1f} %",
    }


def mode_rows(name: str, modes: list[str], by_mode: dict[str, Measured]) -> list[dict]:
    """One row per mode: pairs per second and memory, over those of the first mode that ran."""
    first = next(iter(by_mode.values()), None)
    rows = []
    for mode in modes:
        row = {"data": name, "mode": mode}
        rows.append(row)
        if (own := by_mode.get(mode)) is None:
            row["note"] = NOT_RUN
            continue
        speed = first.seconds() / own.seconds()
        modelled = np.divide(first.flops, own.flops)
        row |= {
            "pairs/s over the first": median(speed),
            "FLOP model": median(modelled),
            "reached": f"{100 * np.median(speed / modelled):.1f} %",
        }
        if torch.cuda.is_available():
            row["pairs/s"] = f"{own.num_pairs / sum(own.wall):.2f}"
            row["peak, GiB"] = f"{own.peak / 2**30:.1f}"
            row["peak of the step alone, GiB"] = f"{own.step_peak / 2**30:.2f}"
            row["that over the first"] = f"{own.step_peak / first.step_peak:.3f}"
        else:
            row["tokens over the first"] = f"{own.tokens / first.tokens:.3f}"
            row["kept for backward over the first"] = f"{own.saved / first.saved:.3f}"
            row["kept for backward, KiB a token"] = f"{own.saved / own.tokens / 1024:.2f}"
    return rows


def data_sets(args: argparse.Namespace, scratch: str) -> list[tuple[str, str, int]]:
    """Name, prefix and groups per step of every data set. Drawn ones are written to `scratch`."""
    size = SIZES[args.size]
    sets = [(name, prefix, args.global_batch_size) for name, prefix in args.data]
    for name in args.sets or ():
        groups = max(round(size.tokens / tree_median(name)), 2)
        prefix = str(Path(scratch) / name)
        write_like(prefix, name, groups * (1 + args.rounds), size.vocab_size)
        sets.append((f"lengths of {name}", prefix, groups))
    return sets


def measure_all(args: argparse.Namespace, summaries: Results, modes: Results) -> None:
    """Append the rows of both tables, one data set after another."""
    from megatron_prefix.distributed import open_session

    has_reference = not all(MODES[name].precomputed for name in args.modes)
    with tempfile.TemporaryDirectory() as scratch:
        work = data_sets(args, scratch)
        steps = (1 + args.rounds) * len(args.modes) * len(work)
        first = mode_configs(args, work[0][1], work[0][2], scratch)[args.modes[0]]
        with open_session(first) as world:
            built = None
            for name, prefix, groups in tqdm(work, desc="sets", disable=None):
                configs = mode_configs(args, prefix, groups, scratch)
                dataset = PreferenceDataset(prefix)
                if built is None or built.vocab_size != dataset.vocab_size:
                    built = None
                    free_memory()  # the previous model is in a cycle of references
                    built = Built(first, dataset, world, has_reference, steps)
                by_mode = unless_out_of_memory(
                    lambda b=built, c=configs, d=dataset: measure(b, c, d)
                )
                summaries.append(summary(name, dataset.vocab_size, by_mode or {}))
                modes.append(*mode_rows(name, args.modes, by_mode or {}))
                free_memory()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=named, nargs="+", default=[], metavar="NAME=PREFIX", help="sets of `build`"
    )
    parser.add_argument(
        "--sets",
        nargs="*",
        choices=list(SETS),
        help="drawn with published lengths; without names: all",
    )
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=list(MODES),
        default=[x for x in MODES if x != f"{BASE}, precomputed"],
    )
    parser.add_argument("--rounds", type=int, default=3, help="measured steps of each mode")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--name", default=f"training_{device}", help="of the files under results")
    add_model(parser)
    args = parser.parse_args()
    if args.sets == []:
        args.sets = list(SETS)
    if not args.data and not args.sets:
        parser.error("nothing to run on: give --data NAME=PREFIX or --sets")
    if not any(set(pair) <= set(args.modes) for pair in COMPARED):
        parser.error("--modes needs packed, unshared and packed, shared, or both precomputed")
    return args


def main() -> None:
    args = arguments()
    warnings.filterwarnings("ignore", module=r"megatron\.core\..*")
    variables = [f"{x}={os.environ[x]}" for x in ENVIRONMENT if x in os.environ]
    is_computed = set(COMPARED[0]) <= set(args.modes)
    reference = f"Reference {'computed each step' if is_computed else 'precomputed'}."
    clock = "wall clock" if torch.cuda.is_available() else "processor time"
    notes = (
        f"{describe(args)}. {args.global_batch_size} groups a step of real sets, about "
        f"{SIZES[args.size].tokens} tokens of trees a step of drawn ones, whose lengths are "
        f"log-normal around the published medians, spread {SPREAD} assumed. By {clock}; medians "
        f"of {args.rounds} rounds, each one step of every mode in turn. Environment: "
        f"{' '.join(variables) or 'as it is'}."
    )
    summaries = Results(args.name, f"{reference} {notes}")
    modes = Results(f"{args.name}_modes", notes)
    measure_all(args, summaries, modes)
    summaries.finish()
    modes.finish()


if __name__ == "__main__":
    main()
