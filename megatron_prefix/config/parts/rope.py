"""Rotary frequencies for longer contexts than the model was first trained on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

from pydantic.dataclasses import dataclass

from megatron_prefix.config.bounds import KNOWN_KEYS, Count, Factor, Switch

_LENGTH = "original_max_position_embeddings"
NEEDED: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor", _LENGTH),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _LENGTH),
    "yarn": ("factor", _LENGTH),
    "longrope": ("short_factor", "long_factor", _LENGTH),
}
"""Settings that each type of scaling needs."""
ALLOWED: dict[str, tuple[str, ...]] = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "truncate"),
    "longrope": ("factor", "attention_factor"),
}
"""Settings that a type may have besides."""


@dataclass(kw_only=True, frozen=True, config=KNOWN_KEYS)
class RopeScaling:
    """How rotary frequencies are scaled; the formulas are in model/layers/rope.py."""

    type: Literal["linear", "dynamic", "llama3", "yarn", "longrope"]
    """`linear`: all frequencies are divided by `factor`. `llama3`: the low ones are, and those
    between `low_freq_factor` and `high_freq_factor` in part. `yarn`: those that turn less than
    `beta_slow` times over the original context are, and those up to `beta_fast` in part.
    `longrope`: each is divided by its own `short_factor`. `dynamic`: none up to the original
    context. With `longrope` and `dynamic`, paths longer than that are refused."""
    factor: Factor | None = None
    low_freq_factor: Factor | None = None
    high_freq_factor: Factor | None = None
    original_max_position_embeddings: Count | None = None
    """Context length in tokens before scaling."""
    attention_factor: Factor | None = None
    """What queries and keys are multiplied by; by default the one of the type's paper."""
    beta_fast: Factor | None = None
    """Turns over the original context; by default 32."""
    beta_slow: Factor | None = None
    """Turns over the original context; by default 1."""
    truncate: Switch | None = None
    """Round the range between `beta_fast` and `beta_slow` to whole channels; by default true."""
    short_factor: tuple[Factor, ...] | None = None
    """One number for each pair of channels."""
    long_factor: tuple[Factor, ...] | None = None
    """The same for paths longer than the original context, which are refused."""

    @property
    def longest_path(self) -> int | None:
        """Tokens of the longest path for which the frequencies do not depend on its length; None:
        they never do."""
        if self.type in ("dynamic", "longrope"):
            return self.original_max_position_embeddings
        return None

    @property
    def amplitude(self) -> float:
        """What queries and keys are multiplied by besides their rotation (Peng et al. 2023, arXiv
        2309.00071, section 3.4; Ding et al. 2024, arXiv 2402.13753)."""
        if self.attention_factor is not None:
            return self.attention_factor
        factor, length = self.factor, self.original_max_position_embeddings
        if self.type not in ("yarn", "longrope") or factor is None or factor <= 1:
            return 1.0
        assert length is not None
        if self.type == "yarn":
            return 0.1 * math.log(factor) + 1.0
        return math.sqrt(1 + math.log(factor) / math.log(length))

    def faults(self, name: str = "model.rope_scaling") -> Iterator[str]:
        """Settings that `type` needs or has no use for; `name` is that of this section."""
        needed, allowed = NEEDED[self.type], ALLOWED.get(self.type, ())
        for key, value in vars(self).items():
            if key == "type" or (value is not None) == (key in needed) or key in allowed:
                continue
            needing = [kind for kind, keys in NEEDED.items() if key in keys]
            needing += [kind for kind, keys in ALLOWED.items() if key in keys]
            yield (
                f"{name}.{key} = {value} with type {self.type}: it is for {', '.join(needing)}, "
                + ("and needed there" if key in needed else "and only there")
            )
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and high <= low:
            yield f"{name}.high_freq_factor = {high} must be above low_freq_factor = {low}"
        if (self.beta_fast or 32) <= (self.beta_slow or 1):
            yield f"{name}.beta_fast = {self.beta_fast} must be above beta_slow = {self.beta_slow}"
        if self.type == "longrope" and (length := self.original_max_position_embeddings) == 1:
            yield f"{name}.{_LENGTH} = {length}: longrope needs 2 or more"
        if self.short_factor is not None and len(self.short_factor) != len(self.long_factor or ()):
            yield f"{name}.short_factor and long_factor need one number for each pair of channels"
