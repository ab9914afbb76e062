"""Survey of a data set: how long, how wide and how deep its trees are, and which cost most.

Columns are read in spans, so a million groups take seconds; tokens are only compared with the
vocabulary. The cost of a group is a forward pass of its tree through a model of 8 billion
parameters, as data/steps/cost.py computes it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_prefix.config import ModelSizes
from megatron_prefix.data.inspect.describe import packed_rows
from megatron_prefix.data.inspect.images import survey_images
from megatron_prefix.data.steps import CostModel
from megatron_prefix.data.store import SHARING_TOKENS, Histogram, PreferenceDataset
from megatron_prefix.data.store.roles import own_responses, without_mismatches
from megatron_prefix.data.store.verify import Span, all_spans, verify_tokens
from megatron_prefix.text import own_counts

SIZES = ModelSizes(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
)
"""The model whose forward pass is the `cost` of a group."""
COST_MODEL = {
    name: getattr(SIZES, name)
    for name in (
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
    )
}
"""Its sizes as a survey has them, under the names of the model section."""
LISTED = 10
"""Number of the costliest groups that are listed."""
BINS = 12
RATIOS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Edges of the histogram of prompt tokens over response tokens. The ends are open."""


def survey(dataset: PreferenceDataset, row_capacity: int | None = None) -> dict[str, Any]:
    """Counts, tokens under each sharing mode, lengths, ratios, shapes, and the costliest groups.

    `factors[a][b]` is the tokens of mode a over those of mode b. A histogram is {"edges",
    "counts"}: bin i holds values from edges[i] up to, not including, edges[i + 1]. A tally, such as
    `responses_per_set`, maps a number to how many sets (or groups) have it. With `row_capacity` the
    result has the fill of an epoch's rows of whole trees too. Raises InputError.
    """
    verify_tokens(dataset)
    manifest, report = dataset.manifest, dataset.manifest["report"]
    tokens = manifest["tokens"]
    result = {
        "prefix": str(dataset.prefix),
        "fingerprint": dataset.fingerprint,
        "tokenizer": manifest["tokenizer"],
        "counts": own_counts(manifest["counts"]),
        "tokens": tokens,
        "factors": {
            a: {b: round(tokens[a] / tokens[b], 4) if tokens[b] else None for b in SHARING_TOKENS}
            for a in SHARING_TOKENS
        },
        "lengths": manifest["lengths"],
        **_Survey(dataset).summary(),
        "build": {
            "records": report.get("num_records"),
            "duplicates": report.get("duplicates", {}).get("num_records"),
            "dropped": {
                reason: {name: lost[name] for name in ("groups", "responses", "pairs")}
                for reason, lost in report.get("dropped", {}).items()
            },
            "wrong": report.get("wrong", {}).get("num_records", 0),
            "truncated": report.get("truncated", {}),
            "notes": report.get("notes", {}),
            "merged": report.get("merged", {}),
        },
    }
    if "mismatches" in manifest["counts"]:
        result["mismatches"] = {
            name: manifest["counts"][name] for name in ("mismatches", "mismatch_tokens")
        }
    if images := survey_images(dataset):
        result["images"] = images
    if row_capacity is not None:
        rows = packed_rows(own_responses(dataset), row_capacity)
        result["packing"] = {
            "row_capacity": row_capacity,
            "rows": rows.num_steps(1),
            "fill": round(rows.fill(), 4),
        }
    return result


class _Survey:
    """One pass over a data set."""

    def __init__(self, dataset: PreferenceDataset) -> None:
        self._lengths = {name: Histogram() for name in ("prompt", "response", "path", "tree")}
        self._tallies = {
            name: Histogram()
            for name in ("responses_per_set", "sets_per_group", "nodes_on_longest_path")
        }
        self._ratios = np.zeros(len(RATIOS) + 1, np.int64)
        self._sums = np.zeros(2, np.int64)
        self._expensive: dict[str, list[dict[str, Any]]] = {"tokens": [], "cost": []}
        self._total_cost = 0.0
        self._cost_model = CostModel.of_model(SIZES, dataset.vocab_size)
        for span in all_spans(dataset):
            self._add(Span(span.start, span.stop, without_mismatches(span.block)))

    def _add(self, span: Span) -> None:
        prompts = span["response_prompts"].astype(np.int64)
        paths = span["response_lengths"].astype(np.int64)
        trees = span.per_group(span.lengths)
        parts = (prompts, paths - prompts, paths, trees)
        for histogram, values in zip(self._lengths.values(), parts, strict=True):
            histogram.add(values)
        # A prompt of 6 tokens and a response of 2: ratio 3, bin 5, which is from 2 up to 4
        ratios = np.searchsorted(RATIOS, prompts / np.maximum(paths - prompts, 1), "right")
        self._ratios += np.bincount(ratios, minlength=len(self._ratios))
        self._sums += (prompts.sum(), (paths - prompts).sum())
        sets = span["response_sets"].astype(np.int64)
        most = int(sets.max()) + 1  # one key per comparison set: group * most + set
        keys = span.group_of_response * most + sets
        sizes = np.unique(keys, return_counts=True)[1]
        firsts = np.cumsum(span["group_responses"]) - span["group_responses"]
        depths = np.maximum.reduceat(
            span.depths, np.cumsum(span["group_nodes"]) - span["group_nodes"]
        )
        shapes = (sizes, np.maximum.reduceat(sets, firsts) + 1, depths)
        for histogram, values in zip(self._tallies.values(), shapes, strict=True):
            histogram.add(values)
        self._add_costs(span, trees)

    def _add_costs(self, span: Span, trees: np.ndarray) -> None:
        area, logit_tokens = span_work(span)
        model = self._cost_model
        cost = (
            model.per_token * trees + model.per_entry * area + model.per_logit_token * logit_tokens
        )
        self._total_cost += float(cost.sum())
        for key, values in (("tokens", trees), ("cost", cost)):
            first = np.argsort(-values, kind="stable")[:LISTED].tolist()
            listed = self._expensive[key] + [
                {
                    "group": span.start + group,
                    "record": int(span["group_records"][group]),
                    "tokens": int(trees[group]),
                    "responses": int(span["group_responses"][group]),
                    "cost": float(cost[group]),
                }
                for group in first
            ]
            self._expensive[key] = sorted(listed, key=lambda g: (-g[key], g["group"]))[:LISTED]

    def summary(self) -> dict[str, Any]:
        prompts, responses = self._sums.tolist()
        return {
            "histograms": {name: h.bins(BINS) for name, h in self._lengths.items()},
            "prompt_over_response": {
                "mean": round(prompts / responses, 4),
                "edges": [0.0, *RATIOS, None],
                "counts": self._ratios.tolist(),
            },
            **{name: tally.tally() for name, tally in self._tallies.items()},
            "expensive": {
                "cost_model": COST_MODEL,
                "total_cost": self._total_cost,
                "by_tokens": self._expensive["tokens"],
                "by_cost": self._expensive["cost"],
            },
        }


def span_work(span: Span) -> tuple[np.ndarray, np.ndarray]:
    """Visible (q, k) entries and logit tokens of each group as a tree, int64 [G] both.

    data/steps/cost.py has the formulas and an example.
    """
    lengths, above = span.lengths, span.ends - span.lengths
    area = span.per_group(lengths * above + lengths * (lengths + 1) // 2)
    # Nodes with loss, and their parents, whose last token predicts the first token of such nodes:
    # once, however many children have loss.
    carries, predicts = np.zeros((2, len(lengths)), bool)
    for node in span.walk():
        carries[node] = True
    predicts[span.parents[carries]] = True
    return area, span.per_group(np.where(carries, lengths - 1, 0) + predicts)
