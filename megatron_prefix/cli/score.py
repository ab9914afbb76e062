"""`megatron-prefix score`: the reference's log-probabilities, computed once."""

from __future__ import annotations

import argparse

from megatron_prefix.cli.options import add_config, quiet_megatron, read_config


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Declare the command and its flags."""
    parser = subparsers.add_parser(
        "score",
        help="reference log-probabilities of every response, once",
        description="Score every response of data.train, and of data.valid where it is set, with "
        "the reference model. Train with loss.reference=precomputed loss.ref_logps=FILE. A killed "
        "run of the same command goes on where it was.",
    )
    add_config(parser)
    parser.add_argument(
        "--output", required=True, metavar="FILE", help="write log-probabilities (nats) there"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Score and write."""
    config = read_config(args)
    quiet_megatron()
    from megatron_prefix.train.scoring import score_reference

    score_reference(config, args.output)
