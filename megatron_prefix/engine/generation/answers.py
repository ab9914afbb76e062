"""Answers of a model to prompts: a token at a time, without a cache of keys and values.

All sequences run as rows of trees, like data, so every layout generates. Each token costs a forward
pass over all sequences. Every data-parallel rank computes the same rows, and the tokens are those
of the first process, so ranks never differ in what they run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prefix.attention import prepare_attention
from megatron_prefix.data.steps.alone import open_rows
from megatron_prefix.distributed import World
from megatron_prefix.engine.batch import TrainBatch, to_device
from megatron_prefix.engine.shadow import kept_random_state
from megatron_prefix.engine.step import next_tokens
from megatron_prefix.model import unwrap

Draw = Callable[[int, int], float]
"""(sequence, tokens so far) -> a number in [0, 1)."""


@contextmanager
def leaving_no_trace(chunks: Sequence[torch.nn.Module], world: World) -> Iterator[None]:
    """The model in evaluation, with its mode and all random numbers as before at the end."""
    modes = [chunk.training for chunk in chunks]
    with kept_random_state(world.device):
        for chunk in chunks:
            chunk.eval()
        yield
    for chunk, mode in zip(chunks, modes, strict=True):
        chunk.train(mode)


def generate(
    chunks: Sequence[torch.nn.Module],
    prompts: Sequence[np.ndarray],
    world: World,
    *,
    max_new_tokens: int,
    stop_tokens: frozenset[int],
    row_capacity: int,
    temperature: float = 0.0,
    draw: Draw | None = None,
) -> list[np.ndarray]:
    """The tokens after each prompt, int64, up to and with the first of `stop_tokens`; collective.

    With a temperature of 0 the most likely token is taken, else the one whose share of the
    cumulative distribution holds `draw`. Rows have at most `row_capacity` tokens if no sequence is
    longer.
    """
    sequences = [prompt.tolist() for prompt in prompts]
    running = list(range(len(sequences)))
    with leaving_no_trace(chunks, world):
        for count in range(max_new_tokens):
            world.beat(f"sample answers, token {count + 1}")
            batches = _batches(chunks, [sequences[i] for i in running], row_capacity, world)
            choose = _Choice(temperature, draw, running, count)
            chosen = next_tokens(chunks, batches, choose)
            tokens = [token for row in chosen for token in row]
            shared = [tokens if world.is_main else None]
            dist.broadcast_object_list(shared, src=0)
            assert shared[0] is not None
            for i, token in zip(running, shared[0], strict=True):
                sequences[i].append(token)
            running = [i for i in running if sequences[i][-1] not in stop_tokens]
            if not running:
                break
    return [np.array(s[len(p) :], np.int64) for s, p in zip(sequences, prompts, strict=True)]


class _Choice:
    """Takes tokens for the rows of one pass; rows come in the order of their sequences."""

    def __init__(
        self, temperature: float, draw: Draw | None, sequences: Sequence[int], count: int
    ) -> None:
        self._temperature, self._draw, self._count = temperature, draw, count
        self._sequences = iter(sequences)

    def __call__(self, logits_RV: Tensor) -> Tensor:
        if not self._temperature:
            return logits_RV.argmax(dim=-1)
        assert self._draw is not None, "a temperature comes with numbers to draw by"
        own = itertools.islice(self._sequences, len(logits_RV))
        shares = [self._draw(sequence, self._count) for sequence in own]
        return drawn(logits_RV, self._temperature, shares)


def drawn(logits_RV: Tensor, temperature: float, shares: Sequence[float]) -> Tensor:
    """For each line the first token at which the cumulative probability exceeds its share; of the
    probabilities 0.2, 0.5, 0.3 the share 0.6 takes token 1."""
    probabilities = torch.softmax(logits_RV.double() / temperature, dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    # the last sum is 1 but for rounding
    limits = cumulative.new_tensor(shares)[:, None] * cumulative[:, -1:]
    return (
        torch.searchsorted(cumulative, limits, right=True)
        .squeeze(-1)
        .clamp(max=logits_RV.shape[-1] - 1)
    )


def _batches(
    chunks: Sequence[torch.nn.Module],
    sequences: Sequence[Sequence[int]],
    capacity: int,
    world: World,
) -> list[TrainBatch]:
    """The sequences in rows on the device."""
    config = unwrap(chunks[0]).config
    context, layout = world.context(config), world.sampler_layout
    batches = []
    multiple = layout["row_multiple"] * config.token_multiple
    for row in open_rows(sequences, capacity, multiple, layout["count_multiple"]):
        share = None if context is None else context.share(row.layout, world.device)
        batch = to_device(row, world.device, share=share).without_auxiliary()
        prepare_attention(batch.params, config)
        batches.append(batch)
    return batches
