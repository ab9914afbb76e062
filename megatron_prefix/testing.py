"""Helpers for tests: random trees and tensors, a mask by definition, and counters of bytes."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_prefix.data import Pair, ResponsePath
from megatron_prefix.layout import TreeLayout


def random_tree(
    rng: np.random.Generator, max_depth: int = 5, max_children: int = 8, max_length: int = 6
) -> TreeLayout:
    """A random tree in depth-first pre-order: up to `max_depth` levels, `max_children` per node.

    Segments have 1 to `max_length` tokens. Deeper nodes have fewer children, so that a tree of
    five levels has only tens of tokens.
    """
    lengths: list[int] = []
    parents: list[int] = []

    def grow(parent: int, depth: int) -> None:
        node = len(lengths)
        lengths.append(int(rng.integers(1, max_length + 1)))
        parents.append(parent)
        if depth < max_depth:
            most = max(1, max_children >> (depth - 1))
            for _ in range(int(rng.integers(0, most + 1))):
                grow(node, depth + 1)

    grow(-1, 1)
    return TreeLayout.from_parents(lengths, parents)


def random_forest(
    rng: np.random.Generator,
    num_trees: int = 3,
    max_depth: int = 5,
    max_children: int = 8,
    max_length: int = 6,
) -> TreeLayout:
    """Several random trees, one after another in a row; see `random_tree`."""
    return TreeLayout.concat(
        random_tree(rng, max_depth, max_children, max_length) for _ in range(num_trees)
    )


def visibility_by_walking(lengths, parents) -> np.ndarray:
    """Attention mask bool [T, T] by definition: a token sees its own root path up to itself.

    For every segment it walks up the parents; it uses neither subtree ends nor positions.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    visible = np.zeros((int(ends[-1]) if len(ends) else 0,) * 2, dtype=bool)
    for segment, length in enumerate(lengths):
        own = slice(ends[segment] - length, ends[segment])
        visible[own, own] = np.tril(np.ones((length, length), dtype=bool))
        ancestor = parents[segment]
        while ancestor != -1:
            visible[own, ends[ancestor] - lengths[ancestor] : ends[ancestor]] = True
            ancestor = parents[ancestor]
    return visible


def random_heads(
    num_tokens: int,
    num_heads: int = 4,
    num_groups: int = 2,
    head_dim: int = 8,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [T, N, H], k and v [T, G, H] that require gradients, and an output gradient [T, N, H].

    They are drawn on CPU in float64 and then rounded to `dtype`, so that every dtype gets the
    same numbers.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int) -> torch.Tensor:
        x = torch.randn(num_tokens, heads, head_dim, generator=generator, dtype=torch.float64)
        return x.to(device=device, dtype=dtype)

    q, k, v = (draw(n).requires_grad_() for n in (num_heads, num_groups, num_groups))
    return q, k, v, draw(num_heads)


def random_group(
    rng: np.random.Generator,
    *,
    max_turns: int = 3,
    max_responses: int = 6,
    max_length: int = 8,
    num_symbols: int = 4,
    vocab_size: int = 256,
) -> tuple[list[ResponsePath], list[Pair]]:
    """A random conversation: the responses of a turn answer one response of the turn before.

    A response has 1 to `max_length` tokens out of `num_symbols` different ones, so responses
    often begin with the same tokens. In each turn one response is the beginning of another, and
    no two are equal. Token ids are below `vocab_size`. Each response forms a pair with each later
    one of its turn.
    """
    symbols = rng.integers(0, vocab_size, num_symbols)

    def draw() -> np.ndarray:
        return rng.choice(symbols, int(rng.integers(1, max_length + 1)))

    paths: list[ResponsePath] = []
    pairs: list[Pair] = []
    prompt = draw()
    for turn in range(int(rng.integers(1, max_turns + 1))):
        count = int(rng.integers(2, max_responses + 1))
        own = {tuple(draw()) for _ in range(count)}
        longest = max(own, key=len)
        own |= {longest[: (len(longest) + 1) // 2], (*longest, *draw())}
        ordered = sorted(own)
        responses = [ordered[i] for i in rng.permutation(len(ordered))[: max(count, 3)]]
        first = len(paths)
        for response in responses:
            tokens = np.concatenate([prompt, response]).astype(np.int64)
            paths.append(ResponsePath(tokens=tokens, loss_start=len(prompt), set_id=turn))
        last = len(paths)
        pairs += [
            Pair(chosen=a, rejected=b) for a in range(first, last) for b in range(a + 1, last)
        ]
        prompt = np.concatenate([paths[int(rng.integers(first, last))].tokens, draw()])
    return paths, pairs


def write_random_set(prefix: str | Path, seed: int, num_groups: int) -> str:
    """Write a data set of random conversations for the byte tokenizer and return its prefix.

    A group has 15 to 100 tokens. The same seed gives the same files.
    """
    from megatron_prefix.data import build_tree
    from megatron_prefix.data.store import DatasetWriter
    from megatron_prefix.data.tokenize import load_tokenizer

    rng = np.random.default_rng(seed)
    with DatasetWriter(prefix, load_tokenizer("bytes").describe()) as writer:
        for record in range(num_groups):
            writer.add(build_tree(*random_group(rng)), record)
        writer.finish()
    return str(prefix)


def free_port() -> int:
    """A free TCP port that is likely still free when a store listens on it later: it is below
    the ports that Linux assigns by itself (from 32768)."""
    for port in random.SystemRandom().sample(range(10240, 32768), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("none of 100 ports below 32768 is free")


class BytesSent(TorchDispatchMode):
    """Context that counts the bytes which this rank sends to other ranks of `group`.

    A rank does not send its own part of a gather, scatter or all-to-all to itself. In a gather
    its part counts once for each other rank, as a ring passes it on.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.rank, self.size, self.total = group.rank(), group.size(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "c10d":
            self.total += self._sent(name, args)
        return func(*args, **(kwargs or {}))

    def _sent(self, name: str, args: tuple) -> int:
        others = self.size - 1
        if name == "_allgather_base_":
            return args[1].nbytes * others
        if name == "_reduce_scatter_base_":
            return args[1].nbytes * others // self.size
        if name == "alltoall_base_":
            _, sent, _, _, splits, *_ = args
            parts = splits or [sent.size(0) // self.size] * self.size
            return (sum(parts) - parts[self.rank]) * sent[:1].nbytes
        raise NotImplementedError(f"bytes of c10d.{name}")


def saved_bytes(forward: Callable[[], torch.Tensor], parameters: Iterable[torch.Tensor]) -> int:
    """Bytes that autograd saves for the backward pass of the tensor that `forward` returns.

    A storage counts once and in full, even if several saved tensors are views of it. Parameters
    do not count, nor does what `torch.utils.checkpoint` computes again in backward.
    """
    own = {x.untyped_storage().data_ptr() for x in parameters}
    saved: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = forward()  # keeps the saved tensors alive, so that no address is used twice
    assert out.requires_grad, "the output has no gradient: nothing is saved for backward"
    return sum(saved.values())
