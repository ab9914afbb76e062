"""The held-out pairs whose margin is worst, with their texts, for the run's report."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.data.tokenize import load_tokenizer
from megatron_prefix.errors import InputError, RunError
from megatron_prefix.trackers import RunFile

MOST_PAIRS = 8
MOST_CHARACTERS = 700
"""Of a prompt its end, of a response its beginning."""


def worst_pairs(
    dataset: PreferenceDataset, scores: np.ndarray, ref_logps: np.ndarray | None, name: str = ""
) -> list[dict[str, Any]]:
    """The pairs with the least margin, worst first.

    `scores` [R] and `ref_logps` [R] are nats, or rewards without a reference. A margin is the
    chosen score less the rejected one, each less the reference's.
    """
    values = scores if ref_logps is None else scores - ref_logps
    groups = np.repeat(np.arange(len(dataset)), np.diff(dataset.group_pairs))
    of_group = np.asarray(dataset.pair_responses, np.int64)
    sides = values[dataset.pair_sides]
    margins = sides[:, 0] - sides[:, 1]
    decode = _decoder(dataset)
    return [
        {"margin": float(margins[i]), "set": name}
        | _described(dataset, of_group[i], int(groups[i]), decode)
        for i in np.argsort(margins, kind="stable")[:MOST_PAIRS]
    ]


def write_examples(folder: str, step: int, pairs: list[dict[str, Any]]) -> None:
    """Write them beside the metrics. Raises RunError."""
    path = Path(folder) / RunFile.EXAMPLES
    ordered = sorted(pairs, key=lambda pair: pair["margin"])[:MOST_PAIRS]
    try:
        partial = path.with_suffix(".tmp")
        text = json.dumps({"step": step, "pairs": ordered}, ensure_ascii=False, indent=1)
        partial.write_text(text + "\n", encoding="utf-8", errors="replace")
        os.replace(partial, path)
    except OSError as error:
        raise RunError(
            f"logging.output = {folder}: {RunFile.EXAMPLES} could not be written ({error}). Free "
            "some space, and resume with train.load"
        ) from error


def _described(
    dataset: PreferenceDataset, pair: np.ndarray, group: int, decode: Callable[[Any], str]
) -> dict[str, Any]:
    """A pair's place and texts; `pair` are responses of the group."""
    tree = dataset[group]
    texts: Mapping[str, str] = {}
    for side, response in zip(("chosen", "rejected"), pair, strict=True):
        tokens, start = tree.response_tokens(int(response))
        prompt, own = decode(tokens[:start]), decode(tokens[start:])
        texts = {"prompt": _end(prompt)} | dict(texts) | {side: _beginning(own)}
    return {"group": group, "record": int(dataset.group_records[group]), **texts}


def _decoder(dataset: PreferenceDataset) -> Callable[[Any], str]:
    """The data set's tokenizer if it is still there, else the ids as text."""
    described = dataset.parts[0].manifest["tokenizer"]
    try:
        tokenizer = load_tokenizer(described["name"])
    except InputError:
        tokenizer = None
    if tokenizer is None or tokenizer.fingerprint != described["fingerprint"]:
        return lambda ids: " ".join(str(int(i)) for i in ids)
    return tokenizer.decode


def _end(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else f"… {text[-MOST_CHARACTERS:]}"


def _beginning(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]} …"
