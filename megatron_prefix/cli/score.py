"""`megatron-prefix score`: log-probabilities of the reference model, computed once."""

from __future__ import annotations

import argparse

from megatron_prefix.cli.options import add_config, quiet_megatron, read_config


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Declare the command and its flags."""
    parser = subparsers.add_parser(
        "score",
        help="log-probabilities of every response by the reference model, once",
        description="Score every response of data.train, and of data.valid if it is set, with the "
        "reference model. Train with loss.reference=precomputed loss.ref_logps=FILE. If the "
        "command is killed, run it again: it continues where it stopped.",
    )
    add_config(parser)
    parser.add_argument(
        "--output", required=True, metavar="FILE", help="write the log-probabilities (nats) to FILE"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Score the data sets and write the sidecar."""
    config = read_config(args)
    quiet_megatron()
    from megatron_prefix.train import score_reference

    score_reference(config, args.output)
