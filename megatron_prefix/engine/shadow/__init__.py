"""The second run of a step, with every response alone: its rows, and gradients beside it."""

from megatron_prefix.engine.shadow.alone import AloneTable, TableReference
from megatron_prefix.engine.shadow.gradients import Difference, HostGradients
from megatron_prefix.engine.shadow.random_state import kept_random_state
from megatron_prefix.engine.table import StepTable, TableLoss

__all__ = [
    "AloneTable",
    "Difference",
    "HostGradients",
    "StepTable",
    "TableLoss",
    "TableReference",
    "kept_random_state",
]
