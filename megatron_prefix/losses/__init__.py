"""Objectives over response log-probabilities: pure functions of tensors."""

from megatron_prefix.losses.preference import PairRewards, dpo_loss

__all__ = ["PairRewards", "dpo_loss"]
