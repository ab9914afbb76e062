"""Work folders: data sets grow in them until they are complete.

A build works in `.NAME.HOST.PID.building` next to PREFIX, and `--merge-prompts` keeps the data set
that it merges in `.NAME.HOST.PID.merging`, `--kto` the one without mismatches in
`.NAME.HOST.PID.matching`. A killed build cannot remove its folder. The next build
of the same PREFIX on the same machine removes it if no process has that number.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
from pathlib import Path

from megatron_prefix.errors import InputError


def checked_prefix(output: str | Path) -> Path:
    """`output` as a prefix of file names. Raises InputError if it cannot be one."""
    if "\0" in str(output) or Path(output).name in ("", ".."):
        raise InputError(f"output {str(output)!r} names no file: give a prefix of file names")
    if str(output).endswith(os.sep):
        raise InputError(f"output {str(output)!r} is a directory: give a prefix of file names")
    return Path(output)


def building_folder(prefix: Path, kind: str = "building") -> Path:
    """This process's folder for `prefix`; `kind` is building, merging or matching."""
    return prefix.with_name(f".{prefix.name}.{platform.node()}.{os.getpid()}.{kind}")


def clear_leftovers(prefix: Path) -> None:
    """Remove the folders of builds of `prefix` whose process has ended."""
    own = f".{prefix.name}.{platform.node()}."
    pattern = re.compile(re.escape(own) + r"(\d+)\.(building|merging|matching)")
    for folder in prefix.parent.iterdir():
        match = pattern.fullmatch(folder.name)
        if match and not _is_running(int(match[1])):
            shutil.rmtree(folder, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
