"""A survey (measure.py) as text of WIDTH columns, the most asked for first."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from megatron_prefix.data.store import SHARING_TOKENS
from megatron_prefix.text import align, counted, format_lengths, image_line, mismatch_cells

WIDTH = 100
BAR = 20
EIGHTHS = " ▏▎▍▌▋▊▉"
SHOWN = 5
"""Costliest groups per list; JSON has more."""
TALLIED = 12
"""Values of a tally that are shown; JSON has all."""


def survey_text(values: Mapping[str, Any]) -> str:
    """The result of `survey` as text."""
    tokenizer = values["tokenizer"]
    lines = [f"{values['prefix']}  ({tokenizer['kind']}, vocabulary {tokenizer['vocab_size']:,})"]
    lines += [f"fingerprint {values['fingerprint']}", ""]
    names = ("groups", "responses", "pairs", "nodes", "tokens")
    cells = [[name, f"{values['counts'][name]:,}"] for name in names]
    if (last := mismatch_cells(values.get("mismatches", {})))[:1]:
        cells = [*([*row, ""] for row in cells), last]
    lines += align(cells)
    if "images" in values:
        lines += _image_lines(values["images"], values["counts"])
    lines += _build_lines(values["build"])
    lines += ["", *_factor_lines(values["tokens"], values["factors"])]
    lines += ["", *format_lengths(values["lengths"])]
    histograms = {f"{n} tokens": _bars(h) for n, h in values["histograms"].items()}
    ratio = values["prompt_over_response"]
    histograms[f"prompt / response tokens (all: {ratio['mean']:.2f})"] = _ratio_bars(ratio)
    lines += _side_by_side(histograms)
    lines += [""]
    for key, name in (
        ("responses_per_set", "responses per comparison set (K)"),
        ("sets_per_group", "comparison sets per group"),
        ("nodes_on_longest_path", "depth: nodes on a group's longest path"),
    ):
        lines += _tally_lines(name, values[key])
    lines += ["", *_expensive_lines(values["expensive"], values["counts"])]
    if "packing" in values:
        packing = values["packing"]
        lines += [
            "",
            f"rows of {counted(packing['row_capacity'], 'token')}  {packing['rows']:,} per epoch, "
            f"{100 * packing['fill']:.1f} % full",
        ]
    return "\n".join(lines)


def _image_lines(images: Mapping[str, Any], counts: Mapping[str, int]) -> list[str]:
    each = images["tokens_per_image"]
    return [
        "",
        image_line(images, counts["tokens"]),
        f"        in {images['groups']:,} of {counted(counts['groups'], 'group')}; {each['min']:,} "
        f"to {counted(each['max'], 'token')} each, median {each['median']:,}; counted for "
        f"{images['family']}",
    ]


def _build_lines(build: Mapping[str, Any]) -> list[str]:
    lines = []
    if build["duplicates"] is not None:
        lines.append(
            f"duplicates  {counted(build['duplicates'], 'record')} like an earlier one (kept)"
        )
    for reason, lost in sorted(build["dropped"].items()):
        parts = ", ".join(f"{count:,} {name}" for name, count in lost.items() if count)
        lines.append(f"dropped     {reason}: {parts}")
    if build["wrong"]:
        lines.append(f"wrong       {counted(build['wrong'], 'record')} skipped")
    if build["truncated"].get("responses"):
        cut = build["truncated"]
        lines.append(
            f"truncated   {cut['tokens']:,} prompt tokens of "
            f"{counted(cut['responses'], 'response')} in {counted(cut['groups'], 'group')}"
        )
    lines += [f"note        {count:,} {text}" for text, count in sorted(build["notes"].items())]
    if build["merged"]:
        merged = build["merged"]
        lines.append(
            f"merged      {counted(merged['records'], 'record')} into "
            f"{counted(merged['groups'], 'group')}, {counted(merged['tokens_before'], 'token')} "
            f"into {merged['tokens']:,}"
        )
    return ["", "at build", *(f"  {line}" for line in lines)] if lines else []


def _factor_lines(tokens: Mapping[str, int], factors: Mapping[str, Any]) -> list[str]:
    table = [["tokens by sharing mode", "", *(f"/ {mode}" for mode in SHARING_TOKENS)]]
    for mode in SHARING_TOKENS:
        cells = ["-" if f is None else f"{f:.2f}" for f in factors[mode].values()]
        table.append([f"  {mode}", f"{tokens[mode]:,}", *cells])
    return align(table)


def _bars(histogram: Mapping[str, Any]) -> list[str]:
    edges, counts = histogram["edges"], histogram["counts"]
    labels = [
        f"{low:,}" if high == low + 1 else f"{low:,} - {high - 1:,}"
        for low, high in zip(edges, edges[1:], strict=False)
    ]
    return _chart(labels, counts)


def _ratio_bars(ratio: Mapping[str, Any]) -> list[str]:
    edges = [f"{edge:g}" for edge in ratio["edges"][:-1]]
    labels = [f"{low} - {high}" for low, high in zip(edges, edges[1:], strict=False)]
    return _chart([*labels, f"{edges[-1]} and more"], ratio["counts"])


def _chart(labels: Sequence[str], counts: Sequence[int]) -> list[str]:
    """One line per bin: label, bar, share. The longest bar is BAR wide, and no count is no bar."""
    top, total = max(counts, default=0), max(sum(counts), 1)
    width = max(map(len, labels), default=0)
    lines = []
    for label, count in zip(labels, counts, strict=True):
        eighths = max(round(8 * BAR * count / top), 1) if count else 0
        bar = "█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()
        lines.append(f"  {label.rjust(width)}  {bar.ljust(BAR)} {100 * count / total:5.1f} %")
    return lines


def _side_by_side(charts: Mapping[str, Sequence[str]]) -> list[str]:
    """Charts in two columns, under their names."""
    blocks = [[name, *chart] for name, chart in charts.items()]
    empty: list[str] = []
    lines: list[str] = []
    for left, right in zip_longest(blocks[::2], blocks[1::2], fillvalue=empty):
        lines.append("")
        for a, b in zip_longest(left, right, fillvalue=""):
            lines.append(f"{a.ljust(WIDTH // 2)}{b}".rstrip())
    return lines


def _tally_lines(name: str, tally: Mapping[str, int]) -> list[str]:
    shown = [f"{value}: {count:,}" for value, count in list(tally.items())[:TALLIED]]
    if len(tally) > TALLIED:
        rest = sum(list(tally.values())[TALLIED:])
        shown.append(f"up to {list(tally)[-1]}: {rest:,}")
    return textwrap.wrap(f"{name}  {', '.join(shown)}", WIDTH, subsequent_indent=" " * 4)


def _expensive_lines(expensive: Mapping[str, Any], counts: Mapping[str, int]) -> list[str]:
    model = expensive["cost_model"]
    mean_cost = expensive["total_cost"] / counts["groups"]
    lines = [
        f"costliest groups (cost: a forward pass, {model['num_layers']} layers of "
        f"{model['hidden_size']:,} as in 8B models, whole trees)"
    ]
    header = ["", "group", "record", "responses", "tokens", "TFLOP", "of all", "x mean"]
    table = [header]
    for title, key in (("  by tokens", "by_tokens"), ("  by cost", "by_cost")):
        for place, group in enumerate(expensive[key][:SHOWN]):
            share = 100 * group["cost"] / expensive["total_cost"]
            table.append(
                [
                    "" if place else title,
                    f"{group['group']:,}",
                    f"{group['record']:,}",
                    f"{group['responses']:,}",
                    f"{group['tokens']:,}",
                    f"{group['cost'] / 1e12:,.1f}",
                    f"{share:.2f} %",
                    f"{group['cost'] / mean_cost:.1f}",
                ]
            )
    return lines + align(table)
