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
        needs=("question", "good", "bad"),
        columns=("question", "good", "bad", *PAIR_COLUMNS),
    )

What a module needs is in base.py (Format, `has`, and `pair_example` or, for more than two
responses, `ranked_example`), in ../fields.py (`column`, `number`: they check types and raise the
errors) and in ../turns.py (conversations in any layout). Every column that `read` looks at counts
as read; the reader refuses or lists the others, so a format cannot lose one. To register it:

1. Add it to FORMATS in format_registry.py, before any other format that also accepts its records.
2. Add its name to FORMAT_NAMES in cli/build.py: `--help` lists the names without this package.
3. Add a sample to tests/data/formats/ and its counts to tests/numerics/test_format_samples.py;
   describe the columns in docs/data_format.md, and name the sets that have it in docs/datasets.md.
"""

from __future__ import annotations

from megatron_prefix.data.read.formats.base import (
    DegenerateRecord,
    Example,
    ExampleResponse,
    Reads,
    Reason,
)
from megatron_prefix.data.read.formats.format_registry import FORMATS, detect_format, guess

__all__ = [
    "FORMATS",
    "DegenerateRecord",
    "Example",
    "ExampleResponse",
    "Reads",
    "Reason",
    "detect_format",
    "guess",
]
