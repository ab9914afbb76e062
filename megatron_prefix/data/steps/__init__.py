"""Steps: which groups make a step, in which rows, on which data-parallel rank."""

from megatron_prefix.data.steps.collate import TARGETS, MicroBatch
from megatron_prefix.data.steps.cost import CostModel
from megatron_prefix.data.steps.rows import group_rows
from megatron_prefix.data.steps.sampler import Sampler, Step
from megatron_prefix.data.steps.sharing import SHARING_MODES
from megatron_prefix.data.steps.step_columns import StepColumns

__all__ = [
    "SHARING_MODES",
    "TARGETS",
    "CostModel",
    "MicroBatch",
    "Sampler",
    "Step",
    "StepColumns",
    "group_rows",
]
