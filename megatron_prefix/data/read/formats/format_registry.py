"""The formats by name, and which of them a record has.

A record has the first format that accepts its columns. If none does, or if the record is wrong, the
error names the nearest formats, and what each of them would need.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from megatron_prefix.data.read.formats.arena import ARENA, ARENA_VOTES
from megatron_prefix.data.read.formats.base import (
    Format,
)
from megatron_prefix.data.read.formats.choice import CHOICE
from megatron_prefix.data.read.formats.dialogue import MESSAGES, SHAREGPT, ULTRAINTERACT
from megatron_prefix.data.read.formats.nemo import NEMO_ALIGNER, NEMO_RL
from megatron_prefix.data.read.formats.oasst import OASST
from megatron_prefix.data.read.formats.presence import has
from megatron_prefix.data.read.formats.question import ALPACA, QUESTION
from megatron_prefix.data.read.formats.ranked import RANKED
from megatron_prefix.data.read.formats.rlhf_v import RLHF_V
from megatron_prefix.data.read.formats.shp import SHP
from megatron_prefix.data.read.formats.summaries import SUMMARIES
from megatron_prefix.data.read.formats.swift import SWIFT
from megatron_prefix.data.read.formats.trl import HH, TRL
from megatron_prefix.data.read.formats.ultrafeedback import ULTRAFEEDBACK
from megatron_prefix.data.read.formats.unpaired import UNPAIRED, UNPAIRED_ALPACA, UNPAIRED_TURNS
from megatron_prefix.data.read.formats.webgpt import WEBGPT
from megatron_prefix.errors import InputError

FORMATS: dict[str, Format] = {
    "sharegpt": SHAREGPT,
    "oasst": OASST,
    "ms-swift": SWIFT,
    "messages": MESSAGES,
    "ultrainteract": ULTRAINTERACT,
    "nemo-rl": NEMO_RL,
    "ultrafeedback": ULTRAFEEDBACK,
    "alpaca": ALPACA,
    "question": QUESTION,
    "nemo-aligner": NEMO_ALIGNER,
    "arena": ARENA,
    "arena-votes": ARENA_VOTES,
    "summaries": SUMMARIES,
    "webgpt": WEBGPT,
    "shp": SHP,
    "choice": CHOICE,
    "ranked": RANKED,
    "rlhf-v": RLHF_V,
    "unpaired": UNPAIRED,
    "unpaired-messages": UNPAIRED_TURNS,
    "unpaired-alpaca": UNPAIRED_ALPACA,
    "trl": TRL,
    "hh": HH,
}
"""By name, in the order in which they are tried: a record has the first format that fits."""
NEAREST = 2
"""Formats that an error names."""
COMMON = ("trl", "hh")
"""Formats that are named first among those that lack the same number of columns."""


def detect_format(record: dict[str, Any], mapped: Collection[str] = ()) -> str:
    """The name of the format that fits a record. Raises InputError if none does.

    `mapped` are the columns that `--map` gives: the format reads all of them.
    """
    needed = {name.split("[]")[0] for name in mapped}
    for name, format in FORMATS.items():
        if format.accepts(record) and needed.issubset(format.columns):
            return name
    nearest = _nearest(record, "")
    if not nearest:
        nearest = "expected are chosen and rejected, alone or with prompt or conversations"
    raise InputError(
        f"no known format has the columns {', '.join(sorted(record)) or '(none)'}: {nearest}; "
        "docs/datasets.md has all layouts, and --map COLUMN=PATH renames columns"
    )


def guess(record: dict[str, Any], name: str) -> str:
    """Why a record was taken for format `name`, and which formats are near, for error messages."""
    columns = dict.fromkeys(c for need in FORMATS[name].needs for c in need.split("|"))
    present = ", ".join(column for column in columns if has(record, column))
    text = f"the record was taken for format {name!r} because it has {present or 'no other'}"
    nearest = _nearest(record, name)
    return f"{text}; {nearest}" if nearest else text


def _nearest(record: dict[str, Any], but: str) -> str:
    """The formats with the fewest missing columns, and what each of them lacks."""
    near: list[tuple[int, bool, int, str, list[str]]] = []
    for name, format in FORMATS.items():
        lacks = format.lacks(record)
        if name != but and 0 < len(lacks) < len(format.needs):
            near.append((len(lacks), name not in COMMON, len(near), name, lacks))
    texts = [
        f"{name} (lacks {', '.join(need.split('|')[0] for need in lacks)})"
        for *_, name, lacks in sorted(near)[:NEAREST]
    ]
    return f"nearest are the formats {' and '.join(texts)}" if texts else ""
