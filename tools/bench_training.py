"""Whole training steps by what is shared, packed and precomputed, over what arithmetic allows.

One policy and one optimizer run the same groups in every mode, step by step in turn, so that a
noisy machine slows all of them; a figure is the median over rounds of a ratio of two times of one
round. On CPU a time is the processor time of this process, which other processes' load does not
enter; the wall clock's ratio stands beside it. On CUDA it is the wall clock's.

    python tools/bench_training.py --sets --data HH-RLHF=build/hh OpenAssistant=build/oasst
    python tools/bench_training.py --size 7b --num-layers 16 --sets          # one H200
    python tools/bench_training.py --size 7b --recompute full --sets --modes \\
        "packed, unshared, precomputed" "packed, shared, precomputed"
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from bench_common import publish
from bench_model import MODES, SIZES, add_model, describe, make_config
from bench_sets import named, tree_median, write_like
from bench_shapes import SETS, SPREAD
from tqdm import tqdm

from megatron_prefix.config import Config
from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.flops import ForwardFlops, forward_flops
from megatron_prefix.testing import saved_bytes

BASE, SHARED = "packed, unshared", "packed, shared"
ENVIRONMENT = ("OMP_NUM_THREADS", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")
"""Without the last two glibc gives every large tensor back to the system, and fetching its pages
anew costs more the longer a row is."""


@dataclass
class Measured:
    """One mode's rounds: seconds by both clocks, operations, tokens executed; memory."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    parts: ForwardFlops = field(default_factory=ForwardFlops)
    num_pairs: int = 0
    tokens: int = 0
    """Of the first round, executed."""
    saved: int = 0
    """Bytes kept for backward over the first round's rows, on CPU."""
    peak: int = 0
    """Bytes allocated at most in a step, on CUDA."""

    def seconds(self) -> np.ndarray:
        return np.array(self.wall if torch.cuda.is_available() else self.processor)


def step_flops(parts: ForwardFlops, config: Config) -> float:
    """Operations of a step whose policy's forward pass takes `parts`.

    Backward takes twice the forward pass, a reference model one more, and full recomputation one
    more of the layers.
    """
    passes = 4.0 if config.loss.reference == "model" else 3.0
    recomputed = config.model.recompute_granularity == "full"
    return passes * parts.total + recomputed * (parts.linear + parts.attention)


def known_reference(run, sampler, num_steps: int):
    """What the run's reference model says of the responses of the first steps, as read from a
    sidecar, which a whole data set's would be too slow to write for a benchmark."""
    from megatron_prefix.train.reference import PrecomputedReference, response_index
    from megatron_prefix.train.step import to_device

    dataset = sampler.dataset
    known = np.full(len(dataset.response_lengths), np.nan)
    for step in range(num_steps):
        plan = sampler.step(step)
        rows = sampler.micro_batches(plan)
        batches = [to_device(row, run.world.device, plan.weight) for row in rows]
        for row, batch in zip(rows, run.reference.attach(rows, batches), strict=True):
            known[response_index(dataset, row)] = batch.ref_logps.cpu().numpy()
    reference = run.reference
    rounding = 2.0**-8 if run.config.model.dtype == "bfloat16" else 2.0**-16
    return PrecomputedReference(
        reference.fingerprint, dataset, {dataset.fingerprint: known}, rounding
    )


def runs_of(configs: dict[str, Config], modes: dict, dataset: PreferenceDataset, here) -> dict:
    """A run a mode; all of them share policy, optimizer and reference."""
    from megatron_prefix.train.inputs import training_sampler
    from megatron_prefix.train.prepare import prepare_run

    first = next(iter(configs.values()))
    run = prepare_run(first, dataset, None, here)
    samplers = {mode: training_sampler(config, dataset, here) for mode, config in configs.items()}
    known, model = None, run.reference
    if any(mode.precomputed for mode in modes.values()):
        cheapest = next(name for name, mode in modes.items() if mode.precomputed)
        cheapest = SHARED if SHARED in samplers else cheapest
        known = known_reference(run, samplers[cheapest], first.train.steps)
    run.metrics.close()
    run.reference = None  # where every mode has it precomputed, nobody holds it
    runs = {}
    for name, mode in modes.items():
        loss = replace(configs[name].loss, reference="precomputed" if mode.precomputed else "model")
        runs[name] = replace(
            run,
            config=replace(configs[name], loss=loss),
            sampler=samplers[name],
            reference=known if mode.precomputed else model,
            metrics=None,
        )
    return runs


def timed(run, measured: Measured, is_counted: bool) -> None:
    """One step of a run."""
    on_cuda = torch.cuda.is_available()
    if on_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    plan = run.sampler.step(run.step)
    rows = run.sampler.micro_batches(plan)
    wall, processor = time.perf_counter(), time.process_time()
    run.train_step()
    if on_cuda:
        torch.cuda.synchronize()
    if not is_counted:
        return
    measured.wall.append(time.perf_counter() - wall)
    measured.processor.append(time.process_time() - processor)
    model, vocab_size = run.config.model, run.sampler.dataset.vocab_size
    parts = sum((forward_flops(model, vocab_size, row) for row in rows), ForwardFlops())
    measured.flops.append(step_flops(parts, run.config))
    measured.parts += parts
    measured.num_pairs += plan.num_pairs
    if on_cuda:
        measured.peak = max(measured.peak, torch.cuda.max_memory_allocated())


def kept_for_backward(run) -> tuple[int, int]:
    """Bytes that the policy keeps for backward of the first step's rows, a row at a time, and
    the tokens that these rows execute."""
    from megatron_prefix.model.gpt import unwrap
    from megatron_prefix.train.step import to_device

    model = unwrap(run.policy[0]).train()
    total = tokens = 0
    for row in run.sampler.micro_batches(run.sampler.step(0)):
        batch = to_device(row, run.world.device)
        total += saved_bytes(
            lambda batch=batch: model(batch.tokens, None, None, packed_seq_params=batch.params),
            model.parameters(),
        )
        tokens += len(row.tokens)
    return total, tokens


def measure(args: argparse.Namespace, prefix: str, groups: int) -> dict[str, Measured]:
    """Every mode's rounds over one data set."""
    from megatron_prefix.train.running import running

    dataset = PreferenceDataset(prefix)
    modes = {name: MODES[name] for name in args.modes}
    found = {name: Measured() for name in modes}
    steps = 1 + args.rounds  # the first one warms up
    with tempfile.TemporaryDirectory() as scratch:
        configs = {
            name: make_config(args, prefix, mode, f"{scratch}/{name}", groups, steps)
            for name, mode in modes.items()
        }
        with running(next(iter(configs.values()))) as here:
            runs = runs_of(configs, modes, dataset, here)
            for name, run in runs.items():
                if not torch.cuda.is_available():
                    found[name].saved, found[name].tokens = kept_for_backward(run)
            for step in range(steps):
                for name, run in runs.items():
                    timed(run, found[name], step > 0)
            for run in runs.values():
                run.feed.close()
            run.progress.close()
    return found


def median(values) -> str:
    return f"{np.median(values):.3f}"


def summary(name: str, prefix: str, found: dict[str, Measured]) -> dict:
    """The row of the table of what sharing alone is worth."""
    base, shared = (BASE, SHARED) if SHARED in found else (f"{BASE}, precomputed", [*found][-1])
    none, tree = found[base], found[shared]
    measured, modelled = none.seconds() / tree.seconds(), np.divide(none.flops, tree.flops)
    reached = 100 * measured / modelled
    wall = 100 * np.divide(none.wall, tree.wall) / modelled
    return {
        "data": name,
        "vocabulary": PreferenceDataset(prefix).vocab_size,
        "time none/tree": median(measured),
        "FLOP none/tree": median(modelled),
        "reached": f"{np.median(reached):.1f} %",
        "lowest round": f"{reached.min():.1f} %",
        "reached, wall clock": f"{np.median(wall):.1f} %",
        "head, share of FLOP": f"{100 * tree.parts.head / tree.parts.total:.1f} %",
        "attention, share of FLOP": f"{100 * tree.parts.attention / tree.parts.total:.1f} %",
    }


def mode_rows(name: str, found: dict[str, Measured]) -> list[dict]:
    """A row a mode: pairs a second and memory over the first mode's."""
    first = next(iter(found.values()))
    rows = []
    for mode, own in found.items():
        speed = first.seconds() / own.seconds()
        modelled = np.divide(first.flops, own.flops)
        row = {
            "data": name,
            "mode": mode,
            "pairs/s over the first": median(speed),
            "FLOP model": median(modelled),
            "reached": f"{100 * np.median(speed / modelled):.1f} %",
        }
        if torch.cuda.is_available():
            row["pairs/s"] = f"{own.num_pairs / sum(own.wall):.2f}"
            row["peak, GiB"] = f"{own.peak / 2**30:.1f}"
        else:
            row["tokens over the first"] = f"{own.tokens / first.tokens:.3f}"
            row["kept for backward over the first"] = f"{own.saved / first.saved:.3f}"
            row["kept for backward, KiB a token"] = f"{own.saved / own.tokens / 1024:.2f}"
        rows.append(row)
    return rows


def measure_all(args: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    """The rows of both tables."""
    summaries, modes = [], []
    size = SIZES[args.size]
    with tempfile.TemporaryDirectory() as scratch:
        work = [(name, prefix, args.global_batch_size) for name, prefix in args.data]
        for name in args.sets or ():
            groups = max(round(size.tokens / tree_median(name)), 2)
            prefix = str(Path(scratch) / name)
            write_like(prefix, name, groups * (1 + args.rounds), size.vocab_size)
            work.append((f"lengths of {name}", prefix, groups))
        for name, prefix, groups in tqdm(work, desc="sets", disable=None):
            found = measure(args, prefix, groups)
            summaries.append(summary(name, prefix, found))
            modes += mode_rows(name, found)
    return summaries, modes


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=named, nargs="+", default=[], metavar="NAME=PREFIX", help="sets of `build`"
    )
    parser.add_argument(
        "--sets", nargs="*", choices=list(SETS), help="drawn in published lengths; alone: all"
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
    pairs = [(BASE, SHARED), (f"{BASE}, precomputed", f"{SHARED}, precomputed")]
    if not any(set(pair) <= set(args.modes) for pair in pairs):
        parser.error("--modes needs packed, unshared and packed, shared, or both precomputed")
    return args


def main() -> None:
    args = arguments()
    warnings.filterwarnings("ignore", module=r"megatron\.core\..*")
    summaries, modes = measure_all(args)
    kept = [f"{x}={os.environ[x]}" for x in ENVIRONMENT if x in os.environ]
    clock = "wall clock" if torch.cuda.is_available() else "processor time"
    notes = (
        f"{describe(args)}. {args.global_batch_size} groups a step of real sets, about "
        f"{SIZES[args.size].tokens} tokens of trees a step of drawn ones, whose lengths are "
        f"log-normal around the published medians, spread {SPREAD} assumed. By {clock}; medians "
        f"of {args.rounds} rounds, each one step of every mode in turn. Environment: "
        f"{' '.join(kept) or 'as it is'}."
    )
    publish(args.name, summaries, f"Reference computed each step. {notes}")
    publish(f"{args.name}_modes", modes, notes)


if __name__ == "__main__":
    main()
