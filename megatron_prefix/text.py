"""Tables of plain text: aligned columns, and the counts and lengths of a data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LENGTH_COLUMNS = ("min", "median", "p95", "p99", "max")


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Cells as columns of text: the first column flush left, the others flush right."""
    if not rows:
        return []
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def format_counts(
    counts: Mapping[str, int], tokens: Mapping[str, int], lengths: Mapping[str, Any]
) -> list[str]:
    """Lines with counts, tokens by sharing mode (also as multiples of `tree`), and lengths."""
    modes = [
        [f"  {mode}", f"{number:,}", f"{number / max(tokens['tree'], 1):.2f} x tree"]
        for mode, number in tokens.items()
        if number  # responses without pairs have no tokens under the modes that take pairs
    ]
    return [
        *align([[name, f"{counts[name]:,}"] for name in ("groups", "responses", "pairs")]),
        *["", "tokens by sharing mode", *align(modes)],
        *["", *format_lengths(lengths)],
    ]


def format_lengths(lengths: Mapping[str, Any]) -> list[str]:
    """A table of quantiles and means, one line per name in `lengths`."""
    table = [["", *LENGTH_COLUMNS, "mean"]]
    for name, summary in lengths.items():
        values = [f"{summary.get(column, 0):,}" for column in LENGTH_COLUMNS]
        table.append([f"  {name}", *values, f"{summary.get('mean', 0):,.1f}"])
    return ["lengths in tokens", *align(table)]
