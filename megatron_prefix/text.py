"""Tables of plain text: aligned columns, and the counts and lengths of a data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
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


def counted(count: float, name: str) -> str:
    """A number with its noun: 1 pair, 1,200 pairs, 2 processes, 0.5 minutes."""
    number = f"{count:,}" if isinstance(count, Integral) else f"{count:g}"
    plural = "es" if name.endswith(("s", "x", "tch")) else "s"
    return f"{number} {name}{'' if count == 1 else plural}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds; 3725.4: 1:02:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def own_counts(counts: Mapping[str, int]) -> dict[str, int]:
    """The counts of a data set without its mismatches."""
    taken = {
        "responses": counts.get("mismatches", 0),
        "nodes": counts.get("mismatch_nodes", 0),
        "tokens": counts.get("mismatch_tokens", 0),
    }
    names = ("groups", "nodes", "responses", "pairs", "tokens")
    return {name: counts[name] - taken.get(name, 0) for name in names if name in counts}


def mismatch_cells(counts: Mapping[str, int]) -> list[str]:
    """A line of a table of counts; no cells for a data set without mismatches."""
    if "mismatches" not in counts:
        return []
    own = f"{counts['mismatches']:,}", f"{counted(counts['mismatch_tokens'], 'token')} of their own"
    return ["mismatches", *own]


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
        *align(count_cells(counts, ("groups", "responses", "pairs"))),
        *["", "tokens by sharing mode", *align(modes)],
        *["", *format_lengths(lengths)],
    ]


def count_cells(counts: Mapping[str, int], names: Sequence[str]) -> list[list[str]]:
    """A table of counts without mismatches, and a line for these if there are some."""
    own, last = own_counts(counts), mismatch_cells(counts)
    table = [[name, f"{own[name]:,}", *[""] * bool(last)] for name in names]
    return [*table, last] if last else table


def image_line(images: Mapping[str, Any], tokens: int) -> str:
    """The images of a data set with `tokens` tokens, as its manifest has them, in one line."""
    return (
        f"images  {images['images']:,} of {images['bytes'] / 1e6:,.1f} MB in "
        f"{counted(images['occurrences'], 'place')}, {counted(images['tokens'], 'token')} "
        f"({images['tokens'] / max(tokens, 1):.1%} of all)"
    )


def format_lengths(lengths: Mapping[str, Any]) -> list[str]:
    """A table of quantiles and means, one line per name in `lengths`."""
    table = [["", *LENGTH_COLUMNS, "mean"]]
    for name, summary in lengths.items():
        values = [f"{summary.get(column, 0):,}" for column in LENGTH_COLUMNS]
        table.append([f"  {name}", *values, f"{summary.get('mean', 0):,.1f}"])
    return ["lengths in tokens", *align(table)]
