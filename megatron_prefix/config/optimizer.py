"""The `optimizer` section: Adam, and the schedule of its learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

from pydantic.dataclasses import dataclass

from megatron_prefix.config.bounds import (
    KNOWN_KEYS,
    Epsilon,
    Fraction,
    NonNegative,
    Positive,
    Steps,
    WarmupSteps,
)
from megatron_prefix.text import counted


@dataclass(kw_only=True, frozen=True, config=KNOWN_KEYS)
class OptimizerConfig:
    """Adam with decoupled weight decay, and the schedule of its learning rate."""

    lr: Positive
    min_lr: NonNegative = 0.0
    lr_decay_style: Literal["constant", "linear", "cosine", "WSD"] = "constant"
    """Decay from `lr` to `min_lr` over the run's steps; with `WSD` over the last
    `lr_wsd_decay_steps`."""
    lr_warmup_steps: WarmupSteps | None = None
    """Steps of linear warm-up from a learning rate of 0; without it, and without
    `lr_warmup_fraction`, there is none."""
    lr_warmup_fraction: Fraction | None = None
    """The same as a share of the run's steps, rounded up (TRL's `warmup_ratio`)."""
    lr_wsd_decay_steps: Steps | None = None
    """Steps of the decay at the end, after warm-up and a constant learning rate. Needed with
    `WSD`, and only there."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] | None = None
    """How `WSD` decays: `exponential` if it is not given."""
    weight_decay: NonNegative = 0.0
    """Applied to matrices, not to biases and norms."""
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.999
    adam_eps: Epsilon = 1e-8
    clip_grad: NonNegative = 1.0
    """Largest global gradient norm; 0 turns clipping off."""

    def warmup_steps(self, num_steps: int) -> int:
        """Steps of warm-up in a run of `num_steps`: 5 of 41 steps with a fraction of 0.1."""
        if self.lr_warmup_fraction is not None:
            # 0.1 x 30 is 3.0000000000000004
            return math.ceil(round(self.lr_warmup_fraction * num_steps, 9))
        return self.lr_warmup_steps or 0

    def faults(self) -> Iterator[str]:
        """What the settings do not agree on."""
        if self.min_lr > self.lr:
            yield f"optimizer.min_lr = {self.min_lr} is above optimizer.lr = {self.lr}"
        if self.lr_warmup_steps is not None and self.lr_warmup_fraction is not None:
            yield (
                f"optimizer.lr_warmup_steps = {self.lr_warmup_steps} and "
                f"optimizer.lr_warmup_fraction = {self.lr_warmup_fraction}: give one"
            )
        is_wsd = self.lr_decay_style == "WSD"
        if is_wsd and self.lr_wsd_decay_steps is None:
            yield "optimizer.lr_wsd_decay_steps is missing: lr_decay_style: WSD needs it"
        for key in ("lr_wsd_decay_steps", "lr_wsd_decay_style"):
            if (value := getattr(self, key)) is not None and not is_wsd:
                yield (
                    f"optimizer.{key} = {value} has no effect with lr_decay_style: "
                    f"{self.lr_decay_style}: remove it, or set lr_decay_style: WSD"
                )

    def run_faults(self, num_steps: int) -> Iterator[str]:
        """What does not fit into a run of `num_steps`."""
        warmup = self.warmup_steps(num_steps)
        if warmup >= num_steps:
            key = "lr_warmup_steps" if self.lr_warmup_fraction is None else "lr_warmup_fraction"
            yield (
                f"optimizer.{key} = {getattr(self, key)} does not end within the run's "
                f"{counted(num_steps, 'step')}: lower it"
            )
        elif self.lr_wsd_decay_steps is not None and warmup + self.lr_wsd_decay_steps > num_steps:
            yield (
                f"optimizer.lr_wsd_decay_steps = {self.lr_wsd_decay_steps} and "
                f"{counted(warmup, 'step')} of warm-up are more than the run's "
                f"{counted(num_steps, 'step')}: lower one"
            )
