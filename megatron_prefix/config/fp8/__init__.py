"""FP8: its recipes, and what its settings must agree on."""

from megatron_prefix.config.fp8.rules import (
    CAPABILITIES,
    DEFAULT_RECIPE,
    ROWS,
    fp8_faults,
    fp8_size_faults,
)

__all__ = ["CAPABILITIES", "DEFAULT_RECIPE", "ROWS", "fp8_faults", "fp8_size_faults"]
