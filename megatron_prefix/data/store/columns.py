"""The columns of a data set: their names, types and shapes, and the rule for their values.

Every data set has COLUMNS. It may have some of OPTIONAL_COLUMNS: where one is absent, every entry
has the value `absent`. The manifest lists which columns a data set has. To add an optional column
needs no new version of the format: programs that do not know it refuse the data set by its name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from megatron_prefix.data.tree import MAX_WEIGHT

INT64, INT32, FLOAT64 = (np.dtype(name) for name in ("<i8", "<i4", "<f8"))


class Column(NamedTuple):
    """One column. `tail` is the shape of an entry; None is a size that the manifest gives.

    `rule` says which values an entry may have. `holds`, if that can be decided for each entry
    alone, returns for entries [n, *tail] which of them obey it, bool [n].
    """

    dtype: np.dtype
    tail: tuple[int | None, ...]
    rule: str
    holds: Callable[[np.ndarray], np.ndarray] | None = None
    absent: float | int = 0


def _at_least(low: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda values: values >= low


def _is_not_infinite(values: np.ndarray) -> np.ndarray:
    return ~np.isinf(values)


def _is_above_0(values: np.ndarray) -> np.ndarray:
    return np.isfinite(values) & (values > 0)


COLUMNS: dict[str, Column] = {
    "group_nodes": Column(INT64, (), "begins with 0, ascends, ends with M"),
    "group_responses": Column(INT64, (), "begins with 0, ascends, ends with R"),
    "group_pairs": Column(INT64, (), "begins with 0, ascends (stays 0 if P = 0), ends with P"),
    "group_records": Column(INT64, (), "at least 0, ascending"),
    "group_num_records": Column(
        INT64, (), "1 to 2,147,483,647", lambda values: (values >= 1) & (values < 1 << 31)
    ),
    "node_parents": Column(INT32, (), "-1, or a node of the group before this one"),
    "response_first": Column(INT32, (), "a node on the path to `response_last`"),
    "response_last": Column(INT32, (), "a node of the group"),
    "response_lengths": Column(INT32, (), "the tokens from the root to `response_last`"),
    "response_prompts": Column(INT32, (), "the tokens above `response_first`, at least 1"),
    "response_sets": Column(
        INT32, (), "0 to 1,048,575", lambda values: (values >= 0) & (values < 1 << 20)
    ),
    "response_ranks": Column(INT32, (), "at least -1", _at_least(-1)),
    "response_scores": Column(FLOAT64, (), "NaN, or finite", _is_not_infinite),
    "pair_responses": Column(INT32, (2,), "two different responses of one comparison set"),
    "pair_weights": Column(
        FLOAT64, (), "above 0, at most 1e100", lambda values: (values > 0) & (values <= MAX_WEIGHT)
    ),
    "pair_margins": Column(FLOAT64, (), "NaN, or finite", _is_not_infinite),
}
"""Name -> column. The first word of a name says what an entry belongs to."""

OPTIONAL_COLUMNS: dict[str, Column] = {
    "response_roles": Column(
        INT32, (), "0 or 1", lambda values: (values == 0) | (values == 1), absent=0
    ),
    "response_attributes": Column(
        FLOAT64,
        (None,),
        "NaN, or finite",
        lambda values: np.all(~np.isinf(values), axis=1, keepdims=True)[:, 0],
        absent=np.nan,
    ),
    "pair_betas": Column(
        FLOAT64,
        (),
        "NaN, or finite and above 0",
        lambda values: np.isnan(values) | _is_above_0(values),
        absent=np.nan,
    ),
}
"""Columns that a data set may lack."""

OFFSETS = ("group_nodes", "group_responses", "group_pairs")
"""Columns that begin with 0 and have one entry more than there are groups."""


def column(name: str) -> Column:
    """The column of this name."""
    return COLUMNS[name] if name in COLUMNS else OPTIONAL_COLUMNS[name]


def kind_of(name: str) -> str:
    """What the entries of a column are counted by: `pair_betas` -> `pairs`."""
    return name.split("_")[0] + "s"


def least_tail(name: str) -> tuple[int, ...]:
    """The shape of an entry, with no element where the manifest gives the size."""
    return tuple(size or 0 for size in column(name).tail)


def absent_values(name: str, count: int, tail: tuple[int, ...] | None = None) -> np.ndarray:
    """What `count` entries of an optional column are where a data set lacks it; read-only."""
    about = OPTIONAL_COLUMNS[name]
    shape = (count, *(least_tail(name) if tail is None else tail))
    return np.broadcast_to(np.array(about.absent, about.dtype), shape)
