"""Steps of TRL's `DPOTrainer` and ours: same weights, same tokens, same pairs per step, in turn.

TRL runs every pair of siblings as two sequences, each with its whole prompt, padded to the longest
of a micro batch. Ours runs the groups of these pairs as packed trees. Both run their own reference
model each step. TRL's trainer runs the loop, and after each of its steps comes one of ours. A
step's time is the processor time of this process on CPU (with the wall clock's ratio in addition),
and the wall clock on CUDA. Losses must agree.

    python tools/bench_trl.py --data HH-RLHF=build/hh OpenAssistant=build/oasst
    python tools/bench_trl.py --size 1b --attn-implementation flash_attention_2 …      # CUDA

Needs TRL: pip install trl
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from bench_common import publish
from bench_model import SIZES
from bench_sets import named
from compare_trl import our_config, trl_arguments
from trl_common import Setting, make_model, relative

from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.errors import InputError


@dataclass(frozen=True)
class Steps:
    """A composition with given groups in each step."""

    steps: list[np.ndarray]

    def groups(self, step: int) -> np.ndarray:
        return self.steps[step]

    def num_steps(self, epochs: int) -> int:
        return epochs * len(self.steps)


@dataclass
class Clock:
    """Seconds by both clocks, per step."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    def start(self) -> None:
        self._now = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.wall.append(time.perf_counter() - self._now[0])
        self.processor.append(time.process_time() - self._now[1])

    def seconds(self) -> np.ndarray:
        """Of all steps except the first one, which is a warm-up."""
        return np.array(self.wall if torch.cuda.is_available() else self.processor)[1:]


def exact_steps(counts: np.ndarray, num_pairs: int, num_steps: int) -> list[np.ndarray]:
    """Groups for steps of exactly `num_pairs` pairs, each group at most once, early ones first.

    `counts` are the pairs of each group. Raises InputError if they cannot fill the steps. For
    counts [1, 3, 1, 2] and two steps of 3 pairs: groups [1] and [0, 3].
    """
    left, steps = list(range(len(counts))), []
    for _ in range(num_steps):
        reached: dict[int, list[int]] = {0: []}  # pairs -> groups that together have this many
        for group in left:
            for total, taken in list(reached.items()):
                more = total + int(counts[group])
                if more <= num_pairs:
                    reached.setdefault(more, [*taken, group])
            if num_pairs in reached:
                break
        if num_pairs not in reached:
            raise InputError(
                f"{len(counts)} groups do not make {num_steps} steps of {num_pairs} pairs: ask "
                "for fewer --steps or another --batch-size"
            )
        steps.append(np.array(reached[num_pairs]))
        left = [group for group in left if group not in reached[num_pairs]]
    return steps


def tokens_of(dataset: PreferenceDataset, groups: np.ndarray) -> list[dict[str, list[int]]]:
    """The pairs of these groups in the form that TRL's collator takes."""
    pairs = []
    for group in groups:
        tree = dataset[int(group)]
        for chosen, rejected in tree.pairs.tolist():
            better, start = tree.response_tokens(chosen)
            worse, other = tree.response_tokens(rejected)
            assert start == other, "siblings share their prompt"
            pairs.append(
                {
                    "prompt_ids": better[:start].tolist(),
                    "chosen_ids": better[start:].tolist(),
                    "rejected_ids": worse[start:].tolist(),
                }
            )
    return pairs


def their_trainer(hf: Path, rows: list[dict], args: argparse.Namespace, folder: str):
    """TRL's trainer on these pairs, in this order."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    class Tokenized(DPOTrainer):
        """A trainer for pairs that are already tokenized."""

        def _prepare_dataset(self, dataset, *_):
            return dataset

    def load():
        return AutoModelForCausalLM.from_pretrained(
            hf,
            dtype=getattr(torch, args.dtype),
            attn_implementation=args.attn_implementation,
            trust_remote_code=False,
        )

    setting = Setting(steps=args.steps, batch_size=args.batch_size)
    given = trl_arguments(setting) | {
        "per_device_train_batch_size": args.micro_batch_size,
        "gradient_accumulation_steps": args.batch_size // args.micro_batch_size,
    }
    config = DPOConfig(
        output_dir=folder,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **given,
    )
    return Tokenized(
        model=load(),
        ref_model=load(),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(hf, trust_remote_code=False),
    )


def in_turn(trainer, run) -> tuple[Clock, Clock, list[float], list[float], int]:
    """Run both to the end: (TRL's clock, ours, TRL's losses, ours, tokens that ours executed)."""
    from transformers import PrinterCallback, TrainerCallback

    theirs, ours, rows = Clock(), Clock(), []

    class Turns(TrainerCallback):
        def on_step_begin(self, *_, **__):
            theirs.start()

        def on_step_end(self, *_, **__):
            theirs.stop()
            ours.start()
            rows.append(run.train_step())
            ours.stop()

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Turns())
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "grad_norm" in row]
    executed = sum(row["tokens/executed"] for row in rows)
    return theirs, ours, losses, [row["loss"] for row in rows], executed


def padded_tokens(rows: list[dict], micro_batch_size: int) -> int:
    """Tokens that TRL executes, including padding."""
    total = 0
    for start in range(0, len(rows), micro_batch_size):
        part = rows[start : start + micro_batch_size]
        sides = [
            len(x["prompt_ids"]) + max(len(x["chosen_ids"]), len(x["rejected_ids"])) for x in part
        ]
        total += 2 * len(part) * max(sides)
    return total


def measure(name: str, prefix: str, args: argparse.Namespace, scratch: Path) -> dict:
    """One data set's row of the table."""
    from megatron_prefix.distributed import open_session
    from megatron_prefix.train.setup import prepare_trainer

    dataset = PreferenceDataset(prefix)
    steps = exact_steps(np.diff(dataset.group_pairs), args.batch_size, args.steps)
    rows = [row for groups in steps for row in tokens_of(dataset, groups)]
    model = SIZES[args.size].model
    hf = make_model(
        scratch / name,
        vocab_size=dataset.vocab_size,
        hidden_size=model["hidden_size"],
        intermediate_size=model["ffn_hidden_size"],
        num_hidden_layers=model["num_layers"],
        num_attention_heads=model["num_attention_heads"],
        num_key_value_heads=model.get("num_query_groups") or model["num_attention_heads"],
        initializer_range=0.02,
        pad_token_id=None,  # transformers would not train its embedding
    )
    setting = Setting(steps=args.steps, batch_size=args.batch_size, row_capacity=args.row_capacity)
    config = our_config(scratch / name, hf, setting)
    config = replace(
        config,
        data=replace(config.data, train=prefix),
        model=replace(config.model, dtype=args.dtype),
        train=replace(config.train, save=None),
    )
    with open_session(config) as world:
        run = prepare_trainer(config, dataset, None, world)
        run = replace(run, sampler=replace(run.sampler, composition=Steps(steps)))
        trainer = their_trainer(hf, rows, args, str(scratch / f"{name}.trl"))
        theirs, ours, their_losses, our_losses, executed = in_turn(trainer, run)
        run.close()
    apart = max(relative(our_losses, their_losses))
    if args.dtype == "float32" and apart > 1e-3:
        raise SystemExit(f"{name}: losses differ by {apart:.1e}, so these are not the same steps")
    ratio = theirs.seconds() / ours.seconds()
    wall = np.divide(theirs.wall, ours.wall)[1:]
    return {
        "data": name,
        "pairs a step": args.batch_size,
        "tokens TRL runs / ours": f"{padded_tokens(rows, args.micro_batch_size) / executed:.2f}",
        "step time TRL / ours": f"{np.median(ratio):.2f}",
        "lowest step": f"{ratio.min():.2f}",
        "wall clock": f"{np.median(wall):.2f}",
        "losses apart, relative": f"{apart:.1e}",
    }


def arguments() -> argparse.Namespace:
    on_cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=named, nargs="+", required=True, metavar="NAME=PREFIX")
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--steps", type=int, default=4, help="the first one is a warm-up")
    parser.add_argument("--batch-size", type=int, default=6, help="pairs per step")
    parser.add_argument("--micro-batch-size", type=int, default=2, help="pairs, TRL's")
    parser.add_argument("--row-capacity", type=int, default=8192, help="tokens, ours")
    parser.add_argument("--dtype", default="bfloat16" if on_cuda else "float32")
    parser.add_argument("--attn-implementation", default="sdpa", help="TRL's")
    parser.add_argument("--name", default=f"trl_{'cuda' if on_cuda else 'cpu'}")
    args = parser.parse_args()
    if find_spec("trl") is None:
        parser.error("TRL is not installed: pip install trl")
    if args.batch_size % args.micro_batch_size:
        parser.error("--batch-size must be a multiple of --micro-batch-size")
    return args


def main() -> None:
    from transformers import logging

    args = arguments()
    warnings.filterwarnings("ignore")
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
        rows = [measure(name, prefix, args, Path(scratch)) for name, prefix in args.data]
    model = SIZES[args.size].model
    notes = (
        f"size {args.size}: {model['num_layers']} layers, hidden {model['hidden_size']}, "
        f"feed-forward {model['ffn_hidden_size']}, {args.dtype}; TRL "
        f"{importlib.metadata.version('trl')}, transformers "
        f"{importlib.metadata.version('transformers')}, attention {args.attn_implementation}, "
        f"micro batches of {args.micro_batch_size} pairs; our rows of {args.row_capacity} tokens; "
        "both with a reference model in memory. Median of "
        f"{args.steps - 1} steps of both in turn, by "
        f"{'wall clock' if torch.cuda.is_available() else 'processor time'}."
    )
    publish(args.name, rows, notes)


if __name__ == "__main__":
    main()
