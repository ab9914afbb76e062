"""What a launcher is told when a process ends with a message.

torchrun prints some thirty lines of its own after a process has failed. The last of them show what
the failed process wrote into the file that torchrun names to it, so the message is there again. A
launch script of examples/launch names a file, too: it exists if the input was refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import time


def write_error_file(message: str) -> None:
    """Write the message where torchrun reads it, if torchrun started this process."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"py_callstack": message, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": message, "extraInfo": details}}, file)


def mark_refusal(message: str) -> None:
    """Make the file that MEGATRON_PREFIX_REFUSED names, if a launch script set it: torchrun hides
    exit codes, and wrong input should not be started again. The script prints the message in it
    once more, after the traceback that torchrun prints when a process fails."""
    if path := os.environ.get("MEGATRON_PREFIX_REFUSED"):
        with contextlib.suppress(OSError), open(path, "a", encoding="utf-8") as file:
            file.write(f"{message}\n" if message else "")
