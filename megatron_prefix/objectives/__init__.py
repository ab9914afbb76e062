"""Objectives: pure functions of a table of responses and pairs, one record each.

The loss is computed in pairwise.py (language models) and reward.py (reward models).
"""

from megatron_prefix.objectives.pairwise import dpo_loss, ipo_loss
from megatron_prefix.objectives.record import LossInputs, LossOutputs
from megatron_prefix.objectives.registry import Objective, check
from megatron_prefix.objectives.reward import bradley_terry_loss

__all__ = [
    "LossInputs",
    "LossOutputs",
    "Objective",
    "bradley_terry_loss",
    "check",
    "dpo_loss",
    "ipo_loss",
]
