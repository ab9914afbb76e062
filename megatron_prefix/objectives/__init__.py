"""Objectives over response log-probabilities and rewards: pure functions of tensors."""

from megatron_prefix.objectives.pairwise import PairRewards, dpo_loss
from megatron_prefix.objectives.reward import bradley_terry_loss

__all__ = ["PairRewards", "bradley_terry_loss", "dpo_loss"]
