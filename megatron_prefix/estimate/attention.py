"""What attention holds for a moment in the backward pass of one layer, by the kernel's own sizes.

A row of T tokens is cut into P pieces, whose keys, gathered along root paths, are S together. Of a
rank with N query and G key/value heads of size H, FlashAttention-2 as torch calls it holds

    keys and values, gathered            2 S G H
    their gradients                      2 S G H,  and 2 S N H before query heads are summed (N > G)
    gradients of queries                 T N H
    the same in float32, with a margin   (T + 128 P) N (H' + 1) float32, H' is H rounded up

and after it, for the sum of the copies of a key, its gradients in order, in float32, and the sum.
These are buffers of one call: they exist once, whatever the number of layers and rows in flight.
`te` has kernels of other sizes, about as large. `path`, `dense` and `flex` are not counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from megatron_prefix.config import ModelConfig, ModelSizes, ParallelConfig

FLASH_LIKE = ("auto", "flash", "te")
MARGIN = 128
"""Rows of the float32 gradient that every piece adds."""
SIZE, FLOAT32 = 2, 4
"""Bytes; these kernels compute in 16 bits."""


@dataclass(frozen=True, kw_only=True)
class PathShare:
    """Pieces and gathered keys over tokens, of the rows of a run; without sharing a tree of one
    response has one piece, and as many keys as tokens."""

    pieces: float
    keys: float

    @classmethod
    def of_costs(cls, costs: dict[str, Any] | None) -> PathShare | None:
        """From the costs that `data_plan` gives for a sharing mode."""
        if not costs or not costs["tokens"]:
            return None
        tokens = costs["tokens"]
        return cls(pieces=costs["pieces"] / tokens, keys=costs["gathered_keys"] / tokens)


def attention_buffers(
    model: ModelConfig,
    sizes: ModelSizes,
    parallel: ParallelConfig,
    row_tokens: int,
    paths: PathShare | None,
) -> int:
    """Bytes of one call at a row of `row_tokens` tokens; without `paths`, of a single piece.

    With context parallelism a rank has its share of the queries, and at most all keys.
    """
    if model.attention_backend not in FLASH_LIKE or model.dtype != "bfloat16":
        return 0
    pieces, keys = 1, row_tokens
    if paths is not None:
        pieces = max(math.ceil(row_tokens * paths.pieces), 1)
        keys = max(math.ceil(row_tokens * paths.keys), row_tokens)
    is_gathered = keys > row_tokens
    queries = -(-row_tokens // parallel.context_parallel_size)
    heads = sizes.num_attention_heads / parallel.tensor_model_parallel_size
    groups = sizes.num_query_groups / parallel.tensor_model_parallel_size
    width = sizes.kernel_channels
    of_queries = queries * heads * width * SIZE
    of_keys = keys * groups * width * SIZE
    # 2 pieces of a row of 1000 tokens: 1256 rows of float32
    accumulated = (queries + MARGIN * pieces) * heads * (_rounded(width) + 1) * FLOAT32
    expanded = 2 * keys * heads * width * SIZE if heads != groups else 0
    gathered = 2 * of_keys if is_gathered else 0
    kernel = gathered + of_queries + accumulated + 2 * of_keys + expanded
    if not is_gathered:
        return round(kernel)
    summed = (keys + row_tokens) * groups * width * FLOAT32
    return round(max(kernel, of_queries + 3 * of_keys + summed))


def _rounded(head_dim: int) -> int:
    """The head dim that the kernel computes in: multiples of 32, above 128 of 64."""
    multiple = 32 if head_dim <= 128 else 64
    return -(-head_dim // multiple) * multiple
