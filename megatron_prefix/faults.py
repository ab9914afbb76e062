"""What is printed for an exception that nothing expected: one line; its traceback is in a file."""

from __future__ import annotations

import os
import re
import tempfile
import traceback

OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|[Uu]nable to allocate", re.I)
REMEDY = (
    "the model, or a row of data.row_capacity tokens, does not fit on this machine: "
    "`megatron-prefix plan` prints what a run needs"
)
MOST_CHARACTERS = 300
"""Of the exception's own text."""


def describe_fault(error: BaseException) -> str:
    """The message for `error`; writes its traceback to a new file in the temporary directory."""
    text = " ".join(str(error).split())[:MOST_CHARACTERS]
    named = f"{type(error).__name__}: {text}" if text else type(error).__name__
    rank = os.environ.get("RANK") if os.environ.get("WORLD_SIZE", "1") != "1" else None
    by = "" if rank is None else f"rank {rank}: "
    file = _write_traceback(error)
    if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(named):
        return f"{by}out of memory ({named}): {REMEDY}. The traceback is in {file}"
    return (
        f"{by}{named}. This is a fault of megatron_prefix, not of your input: please report it "
        f"with the traceback, which is in {file}"
    )


def _write_traceback(error: BaseException) -> str:
    """Path of the file, or the last lines of the traceback if none can be written."""
    lines = "".join(traceback.format_exception(error))
    try:
        descriptor, path = tempfile.mkstemp(prefix="megatron-prefix-", suffix=".traceback.txt")
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(lines)
    except OSError as failure:
        return f"no file ({failure.strerror}); it ends with: {' '.join(lines.split())[-1000:]}"
    return path
