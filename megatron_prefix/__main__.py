"""`megatron-prefix COMMAND …`: finds the command and turns its outcome into an exit code.

0 success; 2 bad usage or bad input, with one message on standard error; 1 a run that found itself
wrong, with one message, or an internal failure, with its traceback; 130 interrupted; 143 training
that a signal ended behind a step. Under torchrun rank 0 speaks, or the lowest rank that can where
not all ended alike (see distributed/liveness.py).
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from megatron_prefix.errors import InputError, RunError, Stopped
from megatron_prefix.platform.linux import end_with_parent

COMMANDS = (
    "build",
    "merge",
    "pack",
    "inspect",
    "train",
    "score",
    "evaluate",
    "convert",
    "plan",
    "compare",
)


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _speaks(error: InputError | RunError | Stopped) -> bool:
    return _is_first_rank() if error.speaks is None else error.speaks


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if _is_first_rank():
            super().error(message)
        sys.exit(2)


def _end_with_launcher() -> None:
    """Under torchrun, have the kernel end this process when the launcher dies.

    torchrun gives every process a session of its own, so a kill of its process group does not
    reach them; they would go on writing beside the run that is started next.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    end_with_parent()


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each command's module adds its own part."""
    parser = _Parser(
        prog="megatron-prefix",
        description="Exact prefix-sharing preference training on Megatron-Core.",
        epilog="megatron-prefix COMMAND --help says more.",
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        importlib.import_module(f"megatron_prefix.cli.{name}").add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; argparse exits by itself on bad usage."""
    _end_with_launcher()
    parser = make_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(args, "overrides") or any(x.startswith("-") for x in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # overrides behind a flag, which argparse does not join to those in front of it
        args.overrides += rest
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code or 0
    except (InputError, RunError) as error:
        if _speaks(error):
            print(f"megatron-prefix {args.command}: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except Stopped as stopped:
        if _speaks(stopped):
            print(f"megatron-prefix {args.command}: {stopped}", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has gone, for instance `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
