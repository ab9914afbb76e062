"""Packed steps on disk: `pack` decides once which groups form which row of which step."""

from megatron_prefix.data.steps.packed.reading import (
    PackedSteps,
    describe_packed_steps,
    is_packed_steps,
)
from megatron_prefix.data.steps.packed.verifying import check_rows, verify_packed_steps
from megatron_prefix.data.steps.packed.writing import write_packed_steps

__all__ = [
    "PackedSteps",
    "check_rows",
    "describe_packed_steps",
    "is_packed_steps",
    "verify_packed_steps",
    "write_packed_steps",
]
