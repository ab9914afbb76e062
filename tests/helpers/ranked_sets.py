"""A data set of ranked and scored responses, written tree by tree."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np

from megatron_prefix.data.store.writer import DatasetWriter
from megatron_prefix.data.tokenize.tokenizers import load_tokenizer
from megatron_prefix.data.tree import Pair, ResponsePath, build_tree


def write_ranked_set(
    prefix: Path,
    seed: int,
    num_groups: int,
    *,
    pairs: bool = True,
    weighted: bool = True,
    betas: bool = False,
) -> str:
    """Conversations of one or two comparison sets of two to five responses. Good responses have
    other tokens than bad ones, so that a ranking can be learned. Some ranks are tied, pairs have
    margins and, if `weighted`, weights; every response has a score. Without `pairs` each response
    is alone. With `betas`, every second pair has a beta."""
    rng = np.random.default_rng(seed)
    with DatasetWriter(prefix, load_tokenizer("bytes").describe()) as writer:
        for record in range(num_groups):
            paths: list[ResponsePath] = []
            made: list[Pair] = []
            prompt = rng.integers(32, 127, rng.integers(5, 20))
            for set_id in range(int(rng.integers(1, 3))):
                first, size = len(paths), int(rng.integers(2, 6))
                ranks = np.sort(np.append([0, 1], rng.integers(0, 4, size - 2)))
                ranks = np.unique(ranks, return_inverse=True)[1]
                for rank in ranks:
                    letters = rng.integers(60 + 15 * rank, 75 + 15 * rank, rng.integers(3, 12))
                    paths.append(
                        ResponsePath(
                            tokens=np.concatenate([prompt, letters]),
                            loss_start=len(prompt),
                            set_id=set_id,
                            rank=int(rank) if pairs else -1,
                            score=float(1 - 0.25 * rank + 0.01 * rng.normal()),
                        )
                    )
                for i, j in combinations(range(first, len(paths)), 2):
                    if pairs and paths[i].rank < paths[j].rank:
                        weight, margin = float(rng.uniform(0.5, 2)), float(rng.uniform(0, 1))
                        weight = weight if weighted else 1.0
                        beta = 0.05 + margin / 2 if betas and len(made) % 2 else float("nan")
                        numbers = {"weight": weight, "margin": margin, "beta": beta}
                        made.append(Pair(chosen=i, rejected=j, **numbers))
                prompt = np.concatenate([paths[first].tokens, rng.integers(32, 127, 4)])
            writer.add(build_tree(paths, made), record)
        writer.finish()
    return str(prefix)
