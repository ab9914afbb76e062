"""Sidecars of several models: the policy's own start, and models whose scores are drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_prefix.config import Config
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.reference.sidecars import (
    read_heads,
    read_sidecar,
    sidecar_model,
    write_sidecar,
)
from megatron_prefix.train.scoring import score_reference


def drawn_model(name: str) -> str:
    """A fingerprint."""
    return (name * 64)[:64]


def write_drawn(
    path: Path, name: str, datasets: list[PreferenceDataset], seed: int, skill: float = 0.0
) -> None:
    """A sidecar of drawn log-probabilities, which are above by `skill` for good ranks."""
    rng = np.random.default_rng(seed)
    scores = []
    for data in datasets:
        size = len(data.response_lengths)
        quality = skill * (np.asarray(data.response_ranks) == 0)
        scores.append((data, np.minimum(0, -30 + 5 * rng.normal(size=size) + quality)))
    write_sidecar(str(path), drawn_model(name), scores)


def write_references(folder: Path, config: Config) -> list[dict[str, str]]:
    """`loss.references` for a run: `own` is the policy's start; `good` and `bad` are like it, but
    better and worse at telling chosen from rejected responses."""
    folder.mkdir(parents=True, exist_ok=True)
    own = folder / "own"
    score_reference(config, str(own))
    sets = [config.data.train, *config.data.valid_sets.values()]
    datasets = {data.fingerprint: data for data in map(PreferenceDataset, sets)}
    has_heads = config.loss.ld_alpha is not None
    for seed, (name, skill) in enumerate((("good", 4.0), ("bad", -2.0))):
        rng, scores = np.random.default_rng(seed), []
        for data in datasets.values():
            logps = read_sidecar(str(own), sidecar_model(str(own)), data)
            quality = skill * (np.asarray(data.response_ranks) == 0)
            scores.append((data, np.minimum(0, logps + 2 * rng.normal(size=len(logps)) + quality)))
        heads = [read_heads(str(own), data) for data in datasets.values()] if has_heads else None
        write_sidecar(str(folder / name), drawn_model(name), scores, heads)
    return [{"name": name, "ref_logps": str(folder / name)} for name in ("bad", "own", "good")]
