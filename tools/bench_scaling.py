"""Cost of a prompt with its responses, by the number of responses and by their length.

One tree runs forward and backward through the model, and is compared with the same responses,
each with its own copy of the prompt. Two tables:

    responses  one prompt with K responses, K = 1, 2, 4, 8, 16
    length     a prompt with two responses, together 512 to 8192 tokens

Every ratio is relative to the table's first row. Times are measured in turn; on CPU a time is the
processor time of this process. Memory is what autograd saves for backward.

    python tools/bench_scaling.py
"""

from __future__ import annotations

import argparse
import time
import warnings

import numpy as np
import torch
from bench_common import NOT_RUN, Results, unless_out_of_memory
from bench_model import SIZES, add_model, describe, model_section
from bench_sets import drawn_tree
from tqdm import tqdm

from megatron_prefix.config import Config, parse_config
from megatron_prefix.data.steps import MicroBatch
from megatron_prefix.data.steps.collate import RowItem, collate_packed
from megatron_prefix.data.steps.sharing import view
from megatron_prefix.estimate import forward_flops
from megatron_prefix.testing import saved_bytes

RESPONSES = (1, 2, 4, 8, 16)
LENGTHS = (512, 1024, 2048, 4096, 8192)


def row_of(lengths: list[int], vocab_size: int, is_shared: bool) -> MicroBatch:
    """One tree of a prompt and its responses; or, unshared, each response with its own prompt."""
    tree = drawn_tree(np.random.default_rng(0), lengths, vocab_size)
    if is_shared:
        trees = [tree]
    else:
        trees = [
            drawn_tree(np.random.default_rng(0), [lengths[0], x], vocab_size) for x in lengths[1:]
        ]
    views = [view(tree, "tree", 0) for tree in trees]
    items = [
        RowItem(group=i, view=v, pair_weights=np.ones(len(v.pairs))) for i, v in enumerate(views)
    ]
    return collate_packed(items)


def shapes(table: str) -> dict[int, list[int]]:
    """Lengths of prompt and responses, by the value in which the table's rows differ."""
    if table == "responses":
        return {k: [512] + [128] * k for k in RESPONSES}
    return {n: [n // 2, n // 4, n // 4] for n in LENGTHS}


def run_config(args: argparse.Namespace) -> Config:
    """A configuration of which only the model is used."""
    return parse_config(
        {
            "data": {"train": "none", "row_capacity": 1, "global_batch_size": 1},
            "model": model_section(args),
            "optimizer": {"lr": 1e-5},
            "train": {"steps": 1},
            "logging": {"output": "none"},
        }
    )


class Passes:
    """Forward and backward of rows through one model."""

    def __init__(self, config: Config, vocab_size: int, world) -> None:
        from megatron_prefix.engine import build_model
        from megatron_prefix.model import transformer_config, unwrap

        made = transformer_config(config.model, vocab_size=vocab_size, seed=0)
        self.chunk = build_model(made, world)[0].train()
        self.model, self.device = unwrap(self.chunk), world.device

    def batch(self, row: MicroBatch):
        from megatron_prefix.engine.batch import to_device

        return to_device(row, self.device)

    def forward(self, batch) -> torch.Tensor:
        return self.chunk(batch.tokens, None, None, packed_seq_params=batch.params)

    def seconds(self, batch) -> float:
        on_cuda = self.device.type == "cuda"
        clock = time.perf_counter if on_cuda else time.process_time
        if on_cuda:
            torch.cuda.synchronize()
        start = clock()
        self.forward(batch).sum().backward()
        if on_cuda:
            torch.cuda.synchronize()
        return clock() - start

    def kept(self, batch) -> int:
        return saved_bytes(lambda: self.forward(batch), self.model.parameters())


KINDS = ("tree", "unshared")


class Measured:
    """One row of a table: seconds of each round, bytes saved for backward, FLOP, tokens."""

    def __init__(self, row: MicroBatch, passes: Passes, config: Config, vocab_size: int) -> None:
        self.batch, self.passes = passes.batch(row), passes
        self.tokens = len(row.tokens)
        self.flops = forward_flops(config.model.sizes(), vocab_size, row).total
        self.kept = passes.kept(self.batch)
        self.seconds: list[float] = []

    def round(self) -> bool:
        self.seconds.append(self.passes.seconds(self.batch))
        return True


def measure(
    table: str, args: argparse.Namespace, passes: Passes, config: Config
) -> dict[tuple, Measured]:
    """By (key, kind), the rows of the table that have enough memory for all their passes."""
    vocab_size = SIZES[args.size].vocab_size
    measured: dict[tuple, Measured] = {}
    for key, lengths in shapes(table).items():
        for kind in KINDS:
            row = row_of(lengths, vocab_size, kind == "tree")
            made = unless_out_of_memory(lambda r=row: Measured(r, passes, config, vocab_size))
            if made is not None:
                measured[key, kind] = made
    for _ in tqdm(range(1 + args.rounds), desc=table, disable=None):
        for key in list(measured):
            if unless_out_of_memory(measured[key].round) is None:
                del measured[key]
    for own in measured.values():
        del own.seconds[0]  # the first one warms up
    return measured


def rows_of(table: str, measured: dict[tuple, Measured]) -> list[dict]:
    """One row per key: the tree over the table's first tree, and unshared rows over the tree."""
    first, rows = measured.get((next(iter(shapes(table))), "tree")), []
    for key in shapes(table):
        own, other = (measured.get((key, kind)) for kind in KINDS)
        row: dict = {table: key}
        if own is None or first is None:
            rows.append({**row, "time": NOT_RUN})
            continue
        row |= {
            "tokens executed": own.tokens,
            "tokens": f"{own.tokens / first.tokens:.2f}",
            "kept for backward": f"{own.kept / first.kept:.2f}",
            "FLOP": f"{own.flops / first.flops:.2f}",
            "time": f"{np.median(np.divide(own.seconds, first.seconds)):.2f}",
            "unshared: time": NOT_RUN,
        }
        if other is not None:
            del row["unshared: time"]
            row |= {
                "unshared: tokens": f"{other.tokens / own.tokens:.2f}",
                "unshared: FLOP": f"{other.flops / own.flops:.2f}",
                "unshared: time": f"{np.median(np.divide(other.seconds, own.seconds)):.2f}",
            }
        rows.append(row)
    return rows


def main() -> None:
    from megatron_prefix.distributed import open_session

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--name", default=f"scaling_{device}", help="of the files under results")
    add_model(parser)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", module=r"megatron\.core\..*")
    config = run_config(args)
    notes = (
        "One tree, forward and backward. The first columns are over the table's first row, "
        "`unshared` is the same responses with a prompt each over the tree; by "
        f"{'wall clock' if device == 'cuda' else 'processor time'}, medians of {args.rounds} "
        "rounds, in each of which everything runs once. "
    )
    about = {
        "responses": "A prompt of 512 tokens, responses of 128.",
        "length": "A prompt of half the tokens, two responses of a quarter each.",
    }
    with open_session(config) as world:
        passes = Passes(config, SIZES[args.size].vocab_size, world)
        for table in ("responses", "length"):
            results = Results(f"{args.name}_{table}", f"{about[table]} {notes}{describe(args)}.")
            results.append(*rows_of(table, measure(table, args, passes, config)))
            results.finish()


if __name__ == "__main__":
    main()
