"""The formats of preference records, one module per family, and how to add one.

A format is a function from a record (a dict, as JSON gives it) to an Example, and a `Format`,
which tells how its records are recognised. This is all of a module `stars.py`:

    def read_stars(record: dict[str, Any]) -> Example:
        \"""A question with a good and a bad answer.\"""
        question = user(column(record, "question", str))
        good, bad = (assistant(column(record, name, str)) for name in ("good", "bad"))
        return pair_example(record, (question,), good, bad)

    STARS = Format(
        read=read_stars,
        fits=lambda record: has(record, "question", "good", "bad"),
        columns=("question", "good", "bad", *PAIR_COLUMNS),
    )

What a module needs is in base.py (Format, `has`, and `pair_example` or, for more than two
responses, `ranked_example`) and in ../fields.py (`column`, `number`, `messages`: they check types
and raise the errors). To register it:

1. Add it to FORMATS below, before any other format whose `fits` also accepts its records.
2. Add its name to FORMAT_NAMES in cli/build.py: `--help` lists the names without this package.
3. Add a sample to tests/data/formats/ and what it holds to tests/numerics/test_format_samples.py;
   describe the columns in docs/data_format.md.
"""

from __future__ import annotations

from typing import Any

from megatron_prefix.data.read.formats.base import (
    DegenerateRecord,
    Example,
    ExampleResponse,
    Format,
    Reason,
)
from megatron_prefix.data.read.formats.llama_factory import ALPACA, SHAREGPT
from megatron_prefix.data.read.formats.nemo import NEMO_ALIGNER, NEMO_RL
from megatron_prefix.data.read.formats.oasst import OASST
from megatron_prefix.data.read.formats.swift import SWIFT
from megatron_prefix.data.read.formats.trl import HH, TRL, UNPAIRED
from megatron_prefix.data.read.formats.ultrafeedback import ULTRAFEEDBACK
from megatron_prefix.errors import InputError

__all__ = [
    "FORMATS",
    "DegenerateRecord",
    "Example",
    "ExampleResponse",
    "Reason",
    "detect_format",
]

FORMATS: dict[str, Format] = {
    "sharegpt": SHAREGPT,
    "oasst": OASST,
    "ms-swift": SWIFT,
    "nemo-rl": NEMO_RL,
    "nemo-aligner": NEMO_ALIGNER,
    "ultrafeedback": ULTRAFEEDBACK,
    "alpaca": ALPACA,
    "unpaired": UNPAIRED,
    "trl": TRL,
    "hh": HH,
}
"""By name, in the order in which they are tried: a record has the first format that fits."""


def detect_format(record: dict[str, Any]) -> str:
    """The name of the format that fits a record. Raises InputError if none does."""
    for name, format in FORMATS.items():
        if format.fits(record):
            return name
    raise InputError(
        f"no known format has the columns {', '.join(sorted(record)) or '(none)'}: expected are "
        "chosen and rejected, alone or with prompt or conversations, or the columns of another "
        "format in docs/data_format.md; --map COLUMN=PATH renames columns"
    )
