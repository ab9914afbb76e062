"""Flags and set-up that several commands share."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from typing import TYPE_CHECKING

from megatron_prefix.errors import InputError

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


def tell(text: str) -> None:
    """Print a line to standard error, of the first rank only."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)


def read_config(args: argparse.Namespace) -> Config:
    """The checked configuration, its objective too. Raises InputError."""
    from megatron_prefix.config import load_config
    from megatron_prefix.objectives import check

    config = load_config(args.config, args.overrides, tell)
    try:
        check(config.loss, config.model.kind, num_labels=config.model.num_labels)
    except InputError as error:
        raise InputError(f"{args.config}: {error}") from None
    return config


def quiet_megatron() -> None:
    """Silence Megatron-Core's warnings about optional packages and deprecated calls of torch."""
    warnings.filterwarnings("ignore", module=r"megatron\.core\..*")
    warnings.filterwarnings("ignore", module=r"megatron_prefix\.platform")  # Megatron's calls
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")
    warnings.filterwarnings(
        "ignore", category=UserWarning, module=r"torch\.distributed\.checkpoint\..*"
    )
    logging.getLogger("torch.utils.cpp_extension").addFilter(_not_about_a_compiler)


def _not_about_a_compiler(record: logging.LogRecord) -> bool:
    """Megatron-Core 0.19 imports torch's tools to compile CUDA code, and they warn on a machine
    that has the compiler and no GPU. Nothing is compiled by them."""
    return not record.getMessage().startswith("No CUDA runtime is found")
