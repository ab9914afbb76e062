"""`megatron-prefix train`: a preference training run."""

from __future__ import annotations

import argparse

from megatron_prefix.cli.options import add_config, quiet_megatron, read_config


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Declare the command and its flags."""
    parser = subparsers.add_parser(
        "train",
        help="train on a data set",
        description="Train a model on preferences. Writes config.yaml and metrics.jsonl to "
        "logging.output, and checkpoints to train.save.",
    )
    add_config(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Train until the run ends."""
    config = read_config(args)
    quiet_megatron()
    from megatron_prefix.train import train

    train(config)
