"""Data sets of responses with a label, desirable or not, and of pairs, with mismatches if asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_prefix.data.store import Block
from megatron_prefix.data.store.writer import DatasetWriter
from megatron_prefix.data.tokenize.tokenizers import load_tokenizer
from megatron_prefix.data.tree import Pair, PrefixTree, ResponsePath, build_tree


def write_labelled_set(
    prefix: Path, seed: int, num_groups: int, *, paired: bool = False, mismatches: bool = False
) -> str:
    """Prompts with one to four answers, each labelled 1 or 0, or with one or two pairs if `paired`.

    Good answers have other letters than bad ones. Some groups have no good answer. With
    `mismatches` every group but the first also has one answer of the next group, the last of its
    responses.
    """
    rng = np.random.default_rng(seed)
    drawn = [_group(rng, paired) for _ in range(num_groups)]
    groups = []
    for number, (paths, pairs) in enumerate(drawn):
        roles = [0] * len(paths)
        if mismatches and number:
            prompt = paths[0].tokens[: paths[0].loss_start]
            other = drawn[(number + 1) % num_groups][0][-1]
            tokens = np.concatenate([prompt, other.tokens[other.loss_start :]])
            set_id = max(path.set_id for path in paths) + 1
            paths = [*paths, ResponsePath(tokens=tokens, loss_start=len(prompt), set_id=set_id)]
            roles.append(1)
        groups.append((build_tree(paths, pairs), roles))
    with DatasetWriter(prefix, load_tokenizer("bytes").describe()) as writer:
        writer.add_block(block_with_roles(groups))
        writer.finish()
    return str(prefix)


def block_with_roles(groups: list[tuple[PrefixTree, list[int]]]) -> Block:
    """Groups with the role of each response; without mismatches there is no column of roles."""
    block = Block.of_trees([tree for tree, _ in groups], [(i, 1) for i in range(len(groups))])
    roles = np.array([role for _, own in groups for role in own], np.int32)
    columns = {**block.columns, **({"response_roles": roles} if roles.any() else {})}
    return replace(block, columns=columns)


def _group(rng: np.random.Generator, paired: bool) -> tuple[list[ResponsePath], list[Pair]]:
    prompt = rng.integers(32, 127, rng.integers(4, 16))

    def answer(is_good: bool, set_id: int) -> ResponsePath:
        low = 60 if is_good else 90
        letters = rng.integers(low, low + 20, rng.integers(3, 12))
        score = float("nan") if paired else float(is_good)
        rank = 1 - int(is_good) if paired else -1
        return ResponsePath(
            tokens=np.concatenate([prompt, letters]),
            loss_start=len(prompt),
            set_id=set_id,
            rank=rank,
            score=score,
        )

    count = int(rng.integers(1, 3 if paired else 5))
    if paired:
        paths = [answer(is_good, i) for i in range(count) for is_good in (True, False)]
        return paths, [Pair(chosen=2 * i, rejected=2 * i + 1) for i in range(count)]
    return [answer(bool(rng.integers(0, 2)), i) for i in range(count)], []
