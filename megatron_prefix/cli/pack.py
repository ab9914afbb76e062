"""`megatron-prefix pack`: writes to disk which trees form which row of which step."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_prefix.cli.options import tell
from megatron_prefix.errors import InputError

if TYPE_CHECKING:
    from tqdm import tqdm

    from megatron_prefix.data.steps.compositions import StepSettings
    from megatron_prefix.data.store import PreferenceDataset


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Declare the command and its flags."""
    parser = subparsers.add_parser(
        "pack",
        help="a data set -> the packed steps of a run",
        description="Plan every step of a run in advance: its groups and the rows that they form. "
        "Set data.plan to use the result in train, which runs the same steps without it.",
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="PREFIX | section.key=value",
        help="a data set that build wrote; with --config settings to replace instead",
    )
    parser.add_argument("--output", required=True, metavar="PLAN", help="directory to write")
    parser.add_argument(
        "--config",
        metavar="FILE.yaml",
        help="the configuration of the run: its data sets, and everything that the flags below set",
    )
    parser.add_argument("--row-capacity", type=_positive, metavar="N", help="tokens per row")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--global-batch-size", type=_positive, metavar="G", help="groups per step, over all ranks"
    )
    size.add_argument(
        "--rows-per-step", type=_positive, metavar="R", help="packed rows per step, over all ranks"
    )
    parser.add_argument(
        "--epochs", type=_positive, metavar="E", help="passes over the data (default: 1)"
    )
    parser.add_argument("--seed", type=int, help="data.seed: the order of the data (default: 1234)")
    parser.add_argument(
        "--sharing",
        choices=("tree", "pair", "response", "none"),
        help="what is computed once: every token (tree), each pair's prompt (pair), each response "
        "with its own prompt (response), or nothing (none) (default: tree)",
    )
    parser.add_argument(
        "--sort-by-length",
        action="store_true",
        default=None,
        help="put groups of similar length into a step (less padding) and shuffle the steps; "
        "batches then differ, and so do results",
    )
    parser.add_argument(
        "--packing-method",
        choices=("first-fit", "best-fit"),
        help="the row that gets the next tree, longest tree first: the first with room, or the "
        "one with the least room (default: first-fit)",
    )
    parser.add_argument(
        "--oversized",
        choices=("error", "split"),
        help="a tree, pair or set that does not fit a row: an error, or split into parts that "
        "repeat the prefix that they share (default: error)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Pack and print one line about the packed steps."""
    from megatron_prefix.data.steps.packed import describe_packed_steps, write_packed_steps
    from megatron_prefix.data.store import PreferenceDataset, join_datasets
    from megatron_prefix.data.store.roles import own_responses

    prefixes, settings, steps = (_from_config if args.config else _from_flags)(args)
    datasets = [PreferenceDataset.verified(prefix) for prefix in prefixes]
    dataset = own_responses(join_datasets(datasets))
    if steps is not None and settings.weights is None:
        settings, steps = _with_epochs(settings, dataset, steps), None
    with _Progress() as progress:
        manifest = write_packed_steps(dataset, settings, args.output, progress, steps)
    print(describe_packed_steps(manifest))
    print(f"wrote {args.output}")


Request = tuple[list[str], "StepSettings", int | None]
"""Data sets, settings, and the number of steps if that decides where the plan ends."""


def _from_flags(args: argparse.Namespace) -> Request:
    from megatron_prefix.data.steps.compositions import StepSettings

    if len(args.words) != 1:
        raise InputError(
            f"{len(args.words)} data sets are given: pack takes one PREFIX, or --config with a "
            "data.train that lists several"
        )
    if args.row_capacity is None:
        raise InputError("--row-capacity is missing: give the tokens per row, or --config")
    if args.global_batch_size is None and args.rows_per_step is None:
        raise InputError("--global-batch-size or --rows-per-step is missing: give one, or --config")
    if args.seed is not None and args.seed < 0:
        raise InputError(f"--seed is {args.seed}, but data.seed is at least 0: give another seed")
    given = {name: value for name in FLAGS if (value := getattr(args, name)) is not None}
    return args.words, StepSettings(**{"seed": 1234, "epochs": 1, **given}), None


FLAGS = (
    "row_capacity",
    "global_batch_size",
    "rows_per_step",
    "epochs",
    "seed",
    "sharing",
    "sort_by_length",
    "packing_method",
    "oversized",
)
"""Flags that a configuration has as settings."""


def _from_config(args: argparse.Namespace) -> Request:
    from megatron_prefix.config import load_config
    from megatron_prefix.objectives import check
    from megatron_prefix.train import plan_settings

    for name in FLAGS:
        if getattr(args, name) is not None:
            flag, section = name.replace("_", "-"), "train" if name == "epochs" else "data"
            raise InputError(
                f"--{flag} is set by --config: leave it out, or give {section}.{name}=VALUE"
            )
    config = load_config(args.config, args.words, tell)
    data = config.data
    if not data.packing:
        raise InputError(f"{args.config}: data.packing is false, so there are no rows to plan")
    settings = plan_settings(
        config, check(config.loss, config.model.kind, num_labels=config.model.num_labels)
    )
    return [item.prefix for item in data.train_sets], settings, config.train.steps


def _with_epochs(settings: StepSettings, dataset: PreferenceDataset, steps: int) -> StepSettings:
    """The settings with as many epochs as a run of `steps` steps needs."""
    composition, epochs = settings.composition(dataset), 1
    # the last step of an epoch may be cut, so that the run needs a further epoch
    while composition.num_steps(epochs) <= steps:
        epochs += 1
    return replace(settings, epochs=epochs)


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
