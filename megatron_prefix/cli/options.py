"""Flags and set-up that several commands share."""

from __future__ import annotations

import argparse
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_prefix.config import Config


def add_config(parser: argparse.ArgumentParser) -> None:
    """`--config FILE.yaml [section.key=value …]`."""
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE.yaml",
        help="configuration, with the sections data, model, loss, …",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="replace one setting of the file, for example optimizer.lr=1e-6",
    )


def read_config(args: argparse.Namespace) -> Config:
    """The configuration, checked. Raises InputError."""
    from megatron_prefix.config.schema import load_config

    return load_config(args.config, args.overrides)


def quiet_megatron() -> None:
    """Silence Megatron-Core's warnings about optional packages and deprecated calls of torch."""
    warnings.filterwarnings("ignore", module=r"megatron\.core\..*")
    warnings.filterwarnings("ignore", module=r"megatron_prefix\.platform")  # Megatron's calls
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")
