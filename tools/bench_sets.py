"""Data sets of benchmarks: drawn tokens with the lengths of published sets, or real ones."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from bench_shapes import SETS, SPREAD, medians

from megatron_prefix.data import Pair, PrefixTree, ResponsePath, build_tree
from megatron_prefix.data.store import DatasetWriter


def drawn_tree(rng: np.random.Generator, lengths: Iterable[int], vocab_size: int) -> PrefixTree:
    """A prompt and its responses with these lengths, of drawn tokens. The first response is chosen
    over each other one. All first tokens differ, so that the responses share only the prompt."""
    prompt, *responses = (rng.integers(0, vocab_size, int(n)) for n in lengths)
    for i, response in enumerate(responses):
        response[0] = i
    paths = [
        ResponsePath(tokens=np.concatenate([prompt, r]), loss_start=len(prompt)) for r in responses
    ]
    return build_tree(paths, [Pair(chosen=0, rejected=i) for i in range(1, len(paths))])


def write_like(
    prefix: str | Path, name: str, num_groups: int, vocab_size: int, seed: int = 0
) -> str:
    """Write pairs with the lengths of one of `SETS` and return their prefix.

    Lengths are log-normal around the published medians with the spread `SPREAD`, assumed.
    """
    rng = np.random.default_rng([seed, list(SETS).index(name)])
    prompt, response = medians(name)
    tokenizer = {
        "kind": "drawn",
        "name": f"drawn with the lengths of {name}",
        "vocab_size": vocab_size,
        "bos_id": None,
        "eos_id": None,
        "fingerprint": "0" * 64,
    }
    with DatasetWriter(prefix, tokenizer) as writer:
        for record in range(num_groups):
            lengths = np.array([prompt, response, response])
            lengths = np.maximum(lengths * np.exp(SPREAD * rng.standard_normal(3)), 2)
            writer.add(drawn_tree(rng, lengths.astype(int), vocab_size), record)
        writer.finish()
    return str(prefix)


def tree_median(name: str) -> float:
    """About the median tokens of a prompt and both responses of one of `SETS`."""
    prompt, response = medians(name)
    return prompt + 2 * response


def named(text: str) -> tuple[str, str]:
    """NAME=PREFIX, or a PREFIX that is its own name."""
    name, _, prefix = text.rpartition("=")
    if not Path(prefix + ".json").is_file():
        raise argparse.ArgumentTypeError(f"{prefix}: no such data set; make it with build")
    return name or Path(prefix).name, prefix
