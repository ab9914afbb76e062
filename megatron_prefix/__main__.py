"""The program `megatron-prefix COMMAND …`: runs one command and returns its exit code.

    0    success
    1    RunError, or a fault of this program (faults.py), with one message on standard error
    2    bad usage or bad input, with one message on standard error
    130  interrupted from the keyboard
    143  training that a signal ended after a step

Under torchrun every rank exits with its code, and rank 0 prints the message. If ranks ended in
different ways, failure detection chooses the rank that prints (see distributed/liveness.py).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn, get_args, get_type_hints

from megatron_prefix.errors import InputError, RunError, Stopped
from megatron_prefix.faults import describe_fault
from megatron_prefix.launcher import mark_refusal, write_error_file
from megatron_prefix.other_names import other_name
from megatron_prefix.platform import end_with_parent

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


def _prints(error: InputError | RunError | Stopped) -> bool:
    chosen = error.printed_by_this_process
    return _is_first_rank() if chosen is None else chosen


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if _is_first_rank():
            self.print_usage(sys.stderr)
        _end_with(f"{self.prog}: error: {message}", _is_first_rank())
        mark_refusal(f"{self.prog}: error: {message}" if _is_first_rank() else "")
        sys.exit(2)


class _Version(argparse.Action):
    """Prints the versions of this program and of what its results depend on."""

    def __call__(self, parser: argparse.ArgumentParser, *unused: object) -> NoReturn:
        names = ("megatron-prefix", "megatron-core", "torch", "transformers")
        installed = []
        for name in names:
            with contextlib.suppress(PackageNotFoundError):
                installed.append(f"{name} {version(name)}")
        print(", ".join([*installed, f"Python {platform.python_version()}"]))
        sys.exit(0)


def _end_with_launcher() -> None:
    """Under torchrun, make the kernel end this process when the launcher dies.

    torchrun starts every process in a session of its own, so killing the launcher's process
    group does not reach them. They would keep writing while the next run already writes, too.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    end_with_parent()


def _end_with(message: str, is_printed: bool) -> None:
    """Print the message that this process ends with, if no other one does, and leave it where
    torchrun prints the message of the process that failed first."""
    if is_printed:
        print(message, file=sys.stderr)
    write_error_file(message)


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each command's module adds its own."""
    parser = _Parser(
        prog="megatron-prefix",
        description="Exact prefix-sharing preference training on Megatron-Core.",
        epilog="megatron-prefix COMMAND --help lists the flags of a command.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print versions and exit")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        importlib.import_module(f"megatron_prefix.cli.{name}").add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. On bad usage argparse exits by itself.

    No exception but SystemExit leaves this function.
    """
    command = ""
    try:
        _end_with_launcher()
        args = _parse(argv)
        command = f" {args.command}"
        code = args.run(args)
        sys.stdout.flush()
        return code or 0
    except (InputError, RunError) as error:
        message = f"megatron-prefix{command}: error: {error}"
        _end_with(message, _prints(error))
        if isinstance(error, InputError):
            mark_refusal(message if _prints(error) else "")
            return 2
        return 1
    except Stopped as stopped:
        _end_with(f"megatron-prefix{command}: {stopped}", _prints(stopped))
        return 143
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output is gone, for example `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit:
        raise
    except BaseException as error:  # also a panic of a library in Rust, which is no Exception
        _end_with(f"megatron-prefix{command}: error: {describe_fault(error)}", is_printed=True)
        return 1


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(args, "overrides") or any(x.startswith("-") for x in rest)):
        parser.error(_unrecognized(rest, hasattr(args, "overrides")))
    if rest:  # overrides after a flag: argparse does not join them to those before it
        args.overrides += rest
    return args


def _unrecognized(rest: list[str], takes_settings: bool) -> str:
    """The message for unknown arguments. `takes_settings`: the command has section.key=value, and
    flags of other programs are often such settings."""
    hints = []
    if takes_settings:
        flags = [text.split("=")[0] for text in rest if text.startswith("--")]
        answers = {flag: _setting(flag) or other_name(flag) for flag in flags}
        hints = [f"for {flag} write {answer}" for flag, answer in answers.items() if answer]
        if not hints:
            hints = ["settings are section.key=value, for example optimizer.lr=1e-6"]
    return "; ".join([f"unrecognized arguments: {' '.join(rest)}", *hints])


def _setting(flag: str) -> str | None:
    """The setting with the name of a flag: `--sequence-parallel` is parallel.sequence_parallel."""
    from megatron_prefix.config import Config

    name = flag.lstrip("-").replace("-", "_")
    for section, hint in get_type_hints(Config).items():
        kinds = [kind for kind in (hint, *get_args(hint)) if is_dataclass(kind)]
        if any(name == field.name for kind in kinds for field in fields(kind)):
            return f"{section}.{name}=…"
    return None


if __name__ == "__main__":
    sys.exit(main())
