"""Objectives: pure functions of a table of responses, pairs and sets, one record each.

The table is in table.py, the losses by family: pairwise.py, sides.py, reference_free.py and
ranking.py for language models, reward.py for reward models. Several references become one in
reference_mixtures.py.
"""

from megatron_prefix.objectives.checking import check
from megatron_prefix.objectives.objective import Objective
from megatron_prefix.objectives.record import LossOutputs
from megatron_prefix.objectives.reference_mixtures import ReferenceMixture
from megatron_prefix.objectives.registry import register_objective
from megatron_prefix.objectives.table import LossInputs, ReferenceColumns, ScoreParts

__all__ = [
    "LossInputs",
    "LossOutputs",
    "Objective",
    "ReferenceColumns",
    "ReferenceMixture",
    "ScoreParts",
    "check",
    "register_objective",
]
