"""`megatron-prefix evaluate`: a model's preferences on held-out data."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from megatron_prefix.cli.options import add_config, quiet_megatron, read_config, tell
from megatron_prefix.errors import InputError

if TYPE_CHECKING:
    from megatron_prefix.config import Config


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Declare the command and its flags."""
    parser = subparsers.add_parser(
        "evaluate",
        help="accuracy, margins and loss on data.valid",
        description="Score every response of data.valid with the policy and the reference model. "
        "A reward model has no reference. Without --load the policy is the initial model.",
    )
    add_config(parser)
    parser.add_argument(
        "--load",
        metavar="CKPT",
        help="checkpoint: an iter_… directory, or a directory whose newest iter_… is used",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--per-response",
        metavar="FILE.jsonl",
        help="write for every response: group, response, record, logp (nats; for a reward model "
        "the reward) and num_tokens",
    )
    parser.add_argument(
        "--subsets",
        metavar="FILE.jsonl:KEY",
        help="also print the accuracy of each subset: FILE has the records that data.valid was "
        "built from, in their order, and KEY of a record names its subset",
    )
    parser.add_argument(
        "--texts",
        metavar="FILE.jsonl",
        help="score texts with a reward model instead: lines with prompt and response; prints a "
        "line of JSON for each",
    )
    parser.set_defaults(run=run)


def _for_these_processes(config: Config) -> Config:
    """One process evaluates any run's configuration: its layout is then that of one process."""
    if int(os.environ.get("WORLD_SIZE", "1")) != 1:
        return config
    from megatron_prefix.config import ParallelConfig

    own = config.parallel
    one = ParallelConfig(distributed_timeout_minutes=own.distributed_timeout_minutes)
    changed = [
        f"parallel.{key} = {value}"
        for key, value in asdict(own).items()
        if value != getattr(one, key)
    ]
    if changed:
        tell(f"evaluate: one process, so these have no effect: {', '.join(changed)}")
    return replace(config, parallel=one)


def _subsets(flag: str | None) -> tuple[str, str] | None:
    if flag is None:
        return None
    path, colon, key = flag.rpartition(":")
    if not (path and colon and key):
        raise InputError(f"--subsets {flag}: give a file and a key, as in records.jsonl:category")
    return path, key


def _score_texts(args: argparse.Namespace, config: Config) -> None:
    if args.per_response is not None or args.subsets is not None:
        raise InputError("--texts with --per-response or --subsets, of data.valid: remove one")
    from megatron_prefix.train.texts import score_texts

    for line in score_texts(config, args.load, args.texts):
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(line))


def run(args: argparse.Namespace) -> None:
    """Evaluate and print the metrics."""
    config = _for_these_processes(read_config(args))
    quiet_megatron()
    if args.texts is not None:
        _score_texts(args, config)
        return
    from megatron_prefix.train import evaluate

    metrics = evaluate(config, args.load, args.per_response, _subsets(args.subsets))
    if os.environ.get("RANK", "0") != "0":
        return
    if args.load is None:
        print("evaluate: the policy is the initial model, as --load is not given", file=sys.stderr)
    if args.json:
        print(json.dumps(metrics))
    else:
        width = max(map(len, metrics))
        print("\n".join(f"{key:{width}}  {value:.6g}" for key, value in metrics.items()))
    if args.per_response and not args.json:
        print(f"wrote {args.per_response}")
