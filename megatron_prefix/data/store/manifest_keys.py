"""The keys of a data set's manifest, and what each may be.

After `check_keys` every other module can rely on the types and bounds below.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_prefix.data.json_values import (
    Rule,
    a_list_of,
    a_map_of,
    an_object,
    is_count,
    is_number,
    is_pair,
    is_size,
    is_text,
    one_of,
    or_null,
)
from megatron_prefix.errors import InputError

REMEDY = "build the data set again"
COUNTS = ("groups", "nodes", "responses", "pairs", "tokens")
SHARING_TOKENS = ("none", "response", "pair", "tree")
LENGTHS = ("prompt", "response", "path", "tree")
QUANTILES = ("min", "median", "p95", "p99", "max", "mean")
MAX_VOCABULARY = (1 << 31) - 1
"""Token ids are int32."""


def _are_options(value: Any) -> bool:
    """Options of `build`. Only `inputs` is read again; all are compared and copied."""
    return isinstance(value, dict) and a_list_of(is_text)(value.get("inputs", []))


MISMATCH_COUNTS = ("mismatches", "mismatch_nodes", "mismatch_tokens")
"""Counts of a data set with mismatches: these responses, and nodes and tokens that only they have.
"""
LISTED = {"num_records": is_count, "records": a_list_of(is_text)}
REPORT: dict[str, Rule] = {
    "format": is_text,
    "num_records": is_count,
    "num_rows": is_count,
    "dropped": a_map_of(
        an_object({"groups": is_count, "responses": is_count, "pairs": is_count}, LISTED)
    ),
    "wrong": an_object({}, LISTED),
    "truncated": a_map_of(is_count),
    "added": a_map_of(is_count),
    "notes": a_map_of(is_count),
    "unread": a_map_of(is_count),
    "duplicates": an_object({}, {"num_records": is_count, "records": a_list_of(is_pair)}),
    "merged": a_map_of(is_count),
    "mismatches": a_map_of(is_count),
}
ADDED = an_object({"mode": is_text, "text": a_list_of(is_count), "messages": a_list_of(is_count)})
TOKENIZER = an_object(
    {
        "name": is_text,
        "vocab_size": lambda value: is_size(value) and value <= MAX_VOCABULARY,
        "fingerprint": is_text,
    },
    {
        "kind": is_text,
        "bos_id": or_null(is_count),
        "eos_id": or_null(is_count),
        "vocabulary": is_text,
        "begin_of_text": ADDED,
        "end_of_text": ADDED,
    },
)
KEYS: dict[str, Rule] = {
    "format": is_text,
    "version": is_count,
    "fingerprint": is_text,
    "counts": an_object(
        {**dict.fromkeys(COUNTS, is_size), "pairs": is_count},
        dict.fromkeys(MISMATCH_COUNTS, is_count),
    ),
    "tokens": an_object(dict.fromkeys(SHARING_TOKENS, is_count)),
    "lengths": an_object(dict.fromkeys(LENGTHS, an_object(dict.fromkeys(QUANTILES, is_number)))),
    "columns": a_map_of(lambda value: isinstance(value, dict)),
    "dtype": one_of("uint16", "int32"),
    "tokenizer": TOKENIZER,
    "options": _are_options,
    "report": an_object({}, REPORT),
    "files": a_map_of(an_object({"bytes": is_count, "sha256": is_text})),
    "sha256": is_text,
}


IMAGES = an_object(
    {
        **dict.fromkeys(("images", "occurrences", "tokens", "bytes"), is_size),
        "processor": an_object(
            {
                "family": is_text,
                "kind": is_text,
                "image_token_id": is_count,
                "settings": lambda value: isinstance(value, dict),
                "fingerprint": is_text,
            }
        ),
    }
)
OPTIONAL_KEYS: dict[str, Rule] = {"images": IMAGES}
"""Of a data set with images only."""


def check_keys(manifest: Mapping[str, Any], path: Path) -> None:
    """Refuse a manifest with a key that is missing, unknown, or not what `build` writes."""
    keys = {name: KEYS[name] for name in KEYS if name != "columns" or manifest["version"] > 2}
    for name in [name for name in keys if name not in manifest]:
        raise InputError(f"{path} lacks '{name}': {REMEDY}")
    keys = {**keys, **OPTIONAL_KEYS}
    for name, value in manifest.items():
        if name not in keys:
            raise InputError(
                f"{path} has the key {name!r}, which this version of megatron_prefix does not "
                "know: install a newer version, or build the data set again with this one"
            )
        if not keys[name](value):
            raise InputError(f"{path} is damaged: '{name}' is not what build writes: {REMEDY}")
    vocab_size = manifest["tokenizer"]["vocab_size"]
    if (manifest["dtype"] == "uint16") != (vocab_size <= 1 << 16):
        raise InputError(
            f"{path} is damaged: tokens of type {manifest['dtype']} do not belong to a vocabulary "
            f"of {vocab_size}: {REMEDY}"
        )
