"""The formats of preference records: which columns they have, and what reads them.

One module a family; each turns a record, a dict as JSON gives it, into an Example.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_prefix.data.read.formats.base import Example
from megatron_prefix.data.read.formats.llama_factory import read_alpaca, read_sharegpt
from megatron_prefix.data.read.formats.nemo import read_nemo_aligner, read_nemo_rl
from megatron_prefix.data.read.formats.oasst import read_oasst
from megatron_prefix.data.read.formats.swift import read_swift
from megatron_prefix.data.read.formats.trl import read_hh, read_trl, read_unpaired
from megatron_prefix.data.read.formats.ultrafeedback import read_ultrafeedback
from megatron_prefix.errors import InputError

FORMATS: dict[str, Callable[[dict[str, Any]], Example]] = {
    "hh": read_hh,
    "trl": read_trl,
    "unpaired": read_unpaired,
    "ms-swift": read_swift,
    "nemo-rl": read_nemo_rl,
    "nemo-aligner": read_nemo_aligner,
    "alpaca": read_alpaca,
    "sharegpt": read_sharegpt,
    "ultrafeedback": read_ultrafeedback,
    "oasst": read_oasst,
}


def detect_format(record: dict[str, Any]) -> str:
    """The format a record's columns belong to; InputError names the columns where none fits."""
    has = {name for name, value in record.items() if value is not None}
    compared = bool(record.keys() & {"chosen", "rejected"})
    tests = (
        ("sharegpt", "conversations" in has),
        ("oasst", isinstance(record.get("prompt"), dict)),
        ("ms-swift", "messages" in has and has & {"rejected_response", "rejected_messages"}),
        ("nemo-rl", {"context", "completions"} <= has),
        ("nemo-aligner", has & {"chosen_response", "rejected_response"}),
        ("ultrafeedback", {"instruction", "completions"} <= has),
        ("alpaca", "instruction" in has and compared),
        ("unpaired", {"completion", "label"} <= record.keys() and not compared),
        ("trl", compared and "prompt" in record),
        ("hh", compared),
    )
    for format, fits in tests:
        if fits:
            return format
    raise InputError(
        f"no known format has the columns {', '.join(sorted(record)) or '(none)'}: expected are "
        "chosen and rejected, with prompt or conversations or neither, or another format of "
        "docs/data_format.md; --map COLUMN=PATH gives columns such names"
    )
