"""Several data sets side by side: their surveys as one table, a column per data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_prefix.data.store import SHARING_TOKENS
from megatron_prefix.text import align

COUNTS = ("groups", "responses", "pairs", "tokens")


def compare_surveys(surveys: Sequence[Mapping[str, Any]]) -> str:
    """Results of `survey` as text: counts, sharing, lengths, and whether they can be mixed."""
    table = [["", *(Path(values["prefix"]).name for values in surveys)]]
    for name in COUNTS:
        table.append([name, *(f"{values['counts'][name]:,}" for values in surveys)])
    table.append(["share of the groups", *_shares([v["counts"]["groups"] for v in surveys])])
    table.append(["share of the tokens", *_shares([v["counts"]["tokens"] for v in surveys])])
    for mode in SHARING_TOKENS[:-1]:
        factors = [values["factors"][mode]["tree"] for values in surveys]
        cells = ["-" if factor is None else f"{factor:.2f}" for factor in factors]
        table.append([f"tokens of {mode} / tree", *cells])
    for part in ("prompt", "response", "tree"):
        for quantile in ("median", "max"):
            cells = [f"{values['lengths'][part].get(quantile, 0):,}" for values in surveys]
            table.append([f"{part} tokens, {quantile}", *cells])
    table.append(["vocabulary", *(_vocabulary(values)[:12] for values in surveys)])
    table.append(["fingerprint", *(values["fingerprint"][:12] for values in surveys)])
    same = len({_vocabulary(values) for values in surveys}) == 1
    verdict = "one vocabulary: data.train can list them together"
    if not same:
        verdict = "different vocabularies: build them with one tokenizer to train on all of them"
    return "\n".join([*align(table), "", verdict])


def _shares(numbers: Sequence[int]) -> list[str]:
    total = max(sum(numbers), 1)
    return [f"{100 * number / total:.1f} %" for number in numbers]


def _vocabulary(values: Mapping[str, Any]) -> str:
    tokenizer = values["tokenizer"]
    return tokenizer.get("vocabulary") or f"of tokenizer {tokenizer['fingerprint']}"
