"""`megatron-prefix pack`: writes to disk which trees form which row of which step."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from megatron_prefix.errors import InputError

if TYPE_CHECKING:
    from tqdm import tqdm


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Declare the command and its flags."""
    parser = subparsers.add_parser(
        "pack",
        help="a data set -> the packed steps of a run",
        description="Plan every step of a run in advance: its groups and the rows that they form. "
        "Set data.plan to use the result in train, which runs the same steps without it.",
    )
    parser.add_argument("prefix", metavar="PREFIX", help="a data set that build wrote")
    parser.add_argument("--output", required=True, metavar="PLAN", help="directory to write")
    parser.add_argument(
        "--row-capacity", type=_positive, required=True, metavar="N", help="tokens per row"
    )
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument(
        "--global-batch-size", type=_positive, metavar="G", help="groups per step, over all ranks"
    )
    size.add_argument(
        "--rows-per-step", type=_positive, metavar="R", help="packed rows per step, over all ranks"
    )
    parser.add_argument(
        "--epochs", type=_positive, default=1, metavar="E", help="passes over the data (default: 1)"
    )
    parser.add_argument(
        "--seed", type=int, default=1234, help="data.seed: the order of the data (default: 1234)"
    )
    parser.add_argument(
        "--sharing",
        choices=("tree", "pair", "response", "none"),
        default="tree",
        help="what is computed once: every token (tree), each pair's prompt (pair), each response "
        "with its own prompt (response), or nothing (none) (default: tree)",
    )
    parser.add_argument(
        "--sort-by-length",
        action="store_true",
        help="put groups of similar length into a step (less padding) and shuffle the steps; "
        "batches then differ, and so do results",
    )
    parser.add_argument(
        "--packing-method",
        choices=("first-fit", "best-fit"),
        default="first-fit",
        help="the row that gets the next tree, longest tree first: the first with room, or the "
        "one with the least room (default: first-fit)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Pack and print one line about the packed steps."""
    from megatron_prefix.data.steps.compositions import StepSettings
    from megatron_prefix.data.steps.packed import describe_packed_steps, write_packed_steps
    from megatron_prefix.data.store import PreferenceDataset
    from megatron_prefix.data.store.verify import verify_checksums

    if args.seed < 0:
        raise InputError(f"--seed is {args.seed}, but data.seed is at least 0: give another seed")
    dataset = PreferenceDataset(args.prefix)
    verify_checksums(dataset)
    settings = StepSettings(
        seed=args.seed,
        sharing=args.sharing,
        row_capacity=args.row_capacity,
        global_batch_size=args.global_batch_size,
        rows_per_step=args.rows_per_step,
        sort_by_length=args.sort_by_length,
        packing_method=args.packing_method,
        epochs=args.epochs,
    )
    with _Progress() as progress:
        manifest = write_packed_steps(dataset, settings, args.output, progress)
    print(describe_packed_steps(manifest))
    print(f"wrote {args.output}")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


class _Progress:
    """Progress in steps packed: a bar on a terminal."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, done: int, total: int) -> None:
        if done % 1024 or not sys.stderr.isatty():
            return
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit="step", desc="pack", leave=False)
        self._bar.update(done - self._bar.n)
