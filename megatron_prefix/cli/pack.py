"""`megatron-prefix pack`: which trees form which row of which step, once and on disk."""

from __future__ import annotations

import argparse
import sys

from megatron_prefix.data.store.verify.checks import verify_checksums
from megatron_prefix.errors import InputError


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Declare the command and its flags."""
    parser = subparsers.add_parser(
        "pack",
        help="a data set -> the packed index of a run's steps",
        description="Plan every step of a run once: which groups make it and which rows they "
        "form. train uses the plan through data.plan and does the same steps as without it.",
    )
    parser.add_argument("prefix", metavar="PREFIX", help="data set that build wrote")
    parser.add_argument("--output", required=True, metavar="PLAN", help="directory to write")
    parser.add_argument(
        "--row-capacity", type=_positive, required=True, metavar="N", help="tokens a row"
    )
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument(
        "--global-batch-size", type=_positive, metavar="G", help="groups a step, over all ranks"
    )
    size.add_argument(
        "--rows-per-step", type=_positive, metavar="R", help="packed rows a step, over all ranks"
    )
    parser.add_argument(
        "--epochs", type=_positive, default=1, metavar="E", help="passes (default: 1)"
    )
    parser.add_argument(
        "--seed", type=int, default=1234, help="data.seed, of the order (default: 1234)"
    )
    parser.add_argument(
        "--sharing",
        choices=("tree", "pair", "response", "none"),
        default="tree",
        help="what is computed once (default: tree)",
    )
    parser.add_argument(
        "--sort-by-length",
        action="store_true",
        help="steps of groups of like length, their order permuted; it changes who shares a step",
    )
    parser.add_argument(
        "--packing-method",
        choices=("first-fit", "best-fit"),
        default="first-fit",
        help="which row with room takes the next shorter tree (default: first-fit)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Pack and print one line about the whole plan."""
    from megatron_prefix.data.steps.compositions.settings import StepSettings
    from megatron_prefix.data.steps.packed.reading import describe_packed_steps
    from megatron_prefix.data.steps.packed.writing import write_packed_steps
    from megatron_prefix.data.store.dataset import PreferenceDataset

    if args.seed < 0:
        raise InputError(f"--seed is {args.seed}: data.seed is 0 or more")
    dataset = PreferenceDataset(args.prefix)
    verify_checksums(dataset)
    names = ("seed", "sharing", "row_capacity", "global_batch_size", "rows_per_step")
    names += ("sort_by_length", "packing_method", "epochs")
    settings = StepSettings(**{name: getattr(args, name) for name in names})
    with _Progress() as progress:
        manifest = write_packed_steps(dataset, settings, args.output, progress)
    print(describe_packed_steps(manifest))
    print(f"wrote {args.output}")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value


class _Progress:
    """Steps packed: a bar on a terminal."""

    def __init__(self) -> None:
        self._bar = None

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
