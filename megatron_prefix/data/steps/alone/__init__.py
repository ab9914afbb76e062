"""Steps whose responses run alone: one sequence per row, nothing shared and nothing packed."""

from megatron_prefix.data.steps.alone.rows import AloneSteps, whole_group
from megatron_prefix.data.steps.alone.unfinished import open_rows
from megatron_prefix.data.steps.sharing import alone

__all__ = ["AloneSteps", "alone", "open_rows", "whole_group"]
