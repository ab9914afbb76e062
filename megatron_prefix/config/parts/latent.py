"""Multi-latent attention: queries, keys and values from compressed hidden states.

DeepSeek-V2 (arXiv 2405.04434, section 2.1). A hidden state h of a token becomes

    query   [unrotated | rotated] for each head, of W_up norm(W_down h), or of W h
    latent  c = norm(W_down h), from which W_up makes for each head a key's unrotated channels and
            a value
    key     [unrotated | rotated]; all heads have the same rotated channels, of W_down h
"""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from megatron_prefix.config.bounds import KNOWN_KEYS, Epsilon, Heads, Switch, Width


@dataclass(kw_only=True, frozen=True, config=KNOWN_KEYS)
class LatentAttention:
    """Sizes of multi-latent attention, in channels."""

    query_rank: Width | None = None
    """Of compressed queries; None: queries are made of the hidden states themselves."""
    key_value_rank: Width
    """Of the latent that keys and values are made of."""
    unrotated_channels: Heads
    """Of a query or key head, without the rotated ones."""
    rotated_channels: Heads
    value_channels: Heads
    """Of a value head."""
    down_bias: Switch = False
    """Biases of the two linear layers that compress."""
    norm_epsilon: Epsilon = 1e-6
    """Of the norms of compressed queries and of the latent."""

    @property
    def query_channels(self) -> int:
        """Channels of a query or key head."""
        return self.unrotated_channels + self.rotated_channels

    @property
    def down_rows(self) -> int:
        """Rows of the matrix that makes the latent and the rotated channels of keys."""
        return self.key_value_rank + self.rotated_channels

    def matrices(self, width: int, heads: int) -> tuple[int, int]:
        """Weights of the linear layers of hidden states of `width` channels: (those that every
        tensor-parallel rank has whole, those that are divided by heads)."""
        # width 8, 2 heads of 2 + 2 channels, values of 3; ranks 4 and 5: down 8 (4 + 5 + 2) = 88,
        # up 4 * 8 + 5 * 2 (2 + 3) = 82, out 2 * 3 * 8 = 48
        down = width * (self.down_rows + (self.query_rank or 0))
        up = (self.query_rank or width) * heads * self.query_channels
        up += self.key_value_rank * heads * (self.unrotated_channels + self.value_channels)
        return down, up + heads * self.value_channels * width
