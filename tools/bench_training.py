"""Whole training steps, shared against unshared, over the ratio that arithmetic allows.

Two runs train side by side on the same steps, both packed, both on the same attention backend:
one with `sharing: none`, one with `sharing: tree`. They take turns, so that a noisy machine
slows both; the figure is the median over rounds of the ratio of their times.

    python tools/bench_training.py --data hh
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import warnings

from bench_common import publish
from tqdm import tqdm

from megatron_prefix.config import Config, parse_config
from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.flops import ForwardFlops, forward_flops

POLICY_AND_REFERENCE = 4.0
"""Forward passes' worth of work a row: the reference's, the policy's, and two for backward."""


def add_shape(parser: argparse.ArgumentParser) -> None:
    """Arguments for the data and the model of `make_config`."""
    parser.add_argument("--data", required=True, metavar="PREFIX", help="data set that build wrote")
    parser.add_argument("--num-layers", type=int, default=6)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--ffn-hidden-size", type=int, default=1408)
    parser.add_argument("--row-capacity", type=int, default=4096, help="tokens")
    parser.add_argument("--global-batch-size", type=int, default=32, help="groups a step")
    parser.add_argument("--attention-backend", default="path")


def make_config(args: argparse.Namespace, sharing: str, output: str) -> Config:
    return parse_config(
        {
            "data": {
                "train": args.data,
                "sharing": sharing,
                "row_capacity": args.row_capacity,
                "global_batch_size": args.global_batch_size,
            },
            "model": {
                "num_layers": args.num_layers,
                "hidden_size": args.hidden_size,
                "ffn_hidden_size": args.ffn_hidden_size,
                "num_attention_heads": args.hidden_size // 64,
                "make_vocab_size_divisible_by": 1,
                "attention_backend": args.attention_backend,
            },
            "optimizer": {"lr": 1e-5},
            "train": {"steps": 1 + args.rounds},
            "logging": {"output": output},
        }
    )


def step_flops(run, step: int) -> ForwardFlops:
    plan = run.sampler.step(step)
    vocab_size = run.sampler.dataset.vocab_size
    flops = [
        forward_flops(run.config.model, vocab_size, row) for row in run.sampler.micro_batches(plan)
    ]
    return sum(flops, ForwardFlops())


def measure(args: argparse.Namespace) -> tuple[dict, dict]:
    """Seconds and operations of every round, by sharing mode."""
    from megatron_prefix.train.parallel import world
    from megatron_prefix.train.prepare import prepare_run

    dataset = PreferenceDataset(args.data)
    modes = ("none", "tree")
    with tempfile.TemporaryDirectory() as scratch:
        configs = {mode: make_config(args, mode, f"{scratch}/{mode}") for mode in modes}
        seconds, flops = ({mode: [] for mode in modes} for _ in range(2))
        with world(configs["tree"].parallel, 0) as here:
            runs = {m: prepare_run(configs[m], dataset, None, here) for m in modes}
            for step in tqdm(range(1 + args.rounds), desc="steps", disable=None):
                for mode, run in runs.items():
                    row = run.train_step()
                    if step:  # the first step warms up
                        seconds[mode].append(row["step_time_s"])
                        flops[mode].append(step_flops(run, step))
    return seconds, flops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_shape(parser)
    parser.add_argument("--rounds", type=int, default=7, help="measured steps of each run")
    parser.add_argument("--name", default="training_cpu", help="of the files under results")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", module=r"megatron\.core\..*")
    seconds, flops = measure(args)
    rounds = list(zip(seconds["none"], seconds["tree"], strict=True))
    measured = [none / tree for none, tree in rounds]
    modelled = [
        none.total / tree.total for none, tree in zip(flops["none"], flops["tree"], strict=True)
    ]
    reached = [a / b for a, b in zip(measured, modelled, strict=True)]
    total = sum(flops["tree"], ForwardFlops())
    rows = [
        {
            "vocabulary": PreferenceDataset(args.data).vocab_size,
            "time none/tree": f"{statistics.median(measured):.3f}",
            "FLOP none/tree": f"{statistics.median(modelled):.3f}",
            "reached": f"{100 * statistics.median(reached):.1f} %",
            "lowest round": f"{100 * min(reached):.1f} %",
            "head, share of FLOP": f"{100 * total.head / total.total:.1f} %",
            "attention, share of FLOP": f"{100 * total.attention / total.total:.1f} %",
            "GFLOP/s": f"{POLICY_AND_REFERENCE * total.total / sum(seconds['tree']) / 1e9:.0f}",
        }
    ]
    notes = (
        f"{args.num_layers} layers, hidden {args.hidden_size}, feed-forward "
        f"{args.ffn_hidden_size}, rows of {args.row_capacity}, {args.global_batch_size} groups a "
        f"step, backend {args.attention_backend}, reference computed each step; median of "
        f"{args.rounds} rounds, each one step of both runs in turn."
    )
    publish(args.name, rows, notes)


if __name__ == "__main__":
    main()
