"""Mutants of what `plan` computes; see `mutants.py`."""

from __future__ import annotations

from mutant_list import Mutant

PLAN_MUTANTS = (
    Mutant(
        "operations of the head on every pipeline stage",
        "estimate/step_time.py",
        "if stage == num_stages - 1 else 0.0",
        "if stage >= 0 else 0.0",
        "unit/estimate/test_step_time.py",
    ),
    Mutant(
        "gradients of keys sent in the model's dtype",
        "estimate/traffic.py",
        "again = 1 + GRADIENT_BYTES / BYTES[model.dtype]",
        "again = 1 + GRADIENT_BYTES / 4",
        "unit/estimate/test_step_time.py",
    ),
)
