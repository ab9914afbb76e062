"""`megatron-prefix evaluate`: a model's preferences on held-out data."""

from __future__ import annotations

import argparse
import json
import os
import sys

from megatron_prefix.cli.options import add_config, quiet_megatron, read_config


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Declare the command and its flags."""
    parser = subparsers.add_parser(
        "evaluate",
        help="accuracy, margins and loss on data.valid",
        description="Score every response of data.valid with the policy and the reference. "
        "A reward model has no reference. Without --load the policy is the initial model.",
    )
    add_config(parser)
    parser.add_argument(
        "--load", metavar="CKPT", help="checkpoint: an iter_… directory, or the newest below a root"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--per-response",
        metavar="FILE.jsonl",
        help="write group, response, record, logp (nats; reward for a reward model) and "
        "num_tokens of every response",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Evaluate and print."""
    config = read_config(args)
    quiet_megatron()
    from megatron_prefix.train.evaluation import evaluate

    metrics = evaluate(config, args.load, args.per_response)
    if os.environ.get("RANK", "0") != "0":
        return
    if args.load is None:
        print("evaluate: the weights before training, --load names others", file=sys.stderr)
    if args.json:
        print(json.dumps(metrics))
    else:
        width = max(map(len, metrics))
        print("\n".join(f"{key:{width}}  {value:.6g}" for key, value in metrics.items()))
    if args.per_response and not args.json:
        print(f"wrote {args.per_response}")
