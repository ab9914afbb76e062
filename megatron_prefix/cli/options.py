"""What several commands declare and do alike."""

from __future__ import annotations

import argparse
import warnings

from megatron_prefix.config.schema import Config, load_config
from megatron_prefix.errors import InputError


def add_config(parser: argparse.ArgumentParser) -> None:
    """`--config FILE.yaml [section.key=value …]`."""
    parser.add_argument(
        "--config", required=True, metavar="FILE.yaml", help="sections data, model, loss, …"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="replaces one setting of the file, e.g. optimizer.lr=1e-6",
    )


def read_config(args: argparse.Namespace) -> Config:
    """The checked configuration, its objective too. Raises InputError."""
    from megatron_prefix.objectives import check

    config = load_config(args.config, args.overrides)
    try:
        check(config.loss, config.model.kind)
    except InputError as error:
        raise InputError(f"{args.config}: {error}") from None
    return config


def quiet_megatron() -> None:
    """Silence Megatron-Core's warnings: of optional packages, and of what torch deprecates."""
    warnings.filterwarnings("ignore", module=r"megatron\.core\..*")
    warnings.filterwarnings("ignore", module=r"megatron_prefix\.platform")  # Megatron's calls
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")
