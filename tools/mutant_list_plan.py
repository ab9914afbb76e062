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
    Mutant(
        "a search that recomputes one layer too many",
        "estimate/search.py",
        "while high - low > 1:",
        "while high - low > 2:",
        "unit/estimate/test_search.py",
    ),
    Mutant(
        "a search that keeps the first rows of a layout, not its best",
        "estimate/search.py",
        "if estimate.seconds < of_layout.seconds:",
        "if estimate.seconds < 0:",
        "unit/estimate/test_search.py",
    ),
    Mutant(
        "backward of frozen matrices as of trained ones",
        "estimate/adapters.py",
        "    return 1, 2 if kind",
        "    return 2, 2 if kind",
        "unit/estimate/test_search.py",
    ),
)
