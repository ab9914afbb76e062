"""Mutants of sliding windows, soft caps and sinks; see `mutants.py`."""

from __future__ import annotations

from mutant_list import Mutant

WINDOW_MUTANTS = (
    Mutant(
        "a window counted in tokens of the row",
        "attention/backends/dense.py",
        "positions.unsqueeze(1) - positions.unsqueeze(0) < window",
        "q - k < window",
        "numerics/test_windows.py",
    ),
    Mutant(
        "flash sees one token more than the window",
        "attention/backends/flash.py",
        '"window_size_left": plan.window - 1',
        '"window_size_left": plan.window',
        "numerics/test_windows.py",
    ),
    Mutant(
        "the key at the edge of a window not held",
        "attention/pieces.py",
        "np.maximum(first_positions - window + 1, 0)",
        "np.maximum(first_positions - window + 2, 0)",
        "numerics/test_windows.py",
    ),
    Mutant(
        "slope of the soft cap left out",
        "attention/backends/path.py",
        "            d_scores *= slope\n",
        "            pass\n",
        "numerics/test_windows.py",
    ),
    Mutant(
        "gradient of sinks with the wrong sign",
        "attention/backends/sinks.py",
        "return -(weights * mean_grad)",
        "return (weights * mean_grad)",
        "numerics/test_windows.py",
    ),
    Mutant(
        "sinks of Transformer Engine that every score is computed for",
        "attention/backends/te.py",
        "return sinks_determinism_fault(torch.are_deterministic_algorithms_enabled())",
        "return None",
        "unit/attention/backends/test_te.py",
    ),
    Mutant(
        "every rank takes the sinks of the first heads",
        "attention/context_parallel/transports.py",
        "per_head.chunk(self.group.size())[self.group.rank()]",
        "per_head.chunk(self.group.size())[0]",
        "distributed/test_transports.py",
    ),
    Mutant(
        "every layer has the window",
        "attention/layer_settings.py",
        "[window if kind else None for kind in kinds]",
        "[window for kind in kinds]",
        "numerics/test_packed_trees.py",
    ),
    Mutant(
        "sinks not drawn",
        "model/init.py",
        "if parameter.dim() == 1 and not name.endswith(SINKS):",
        "if parameter.dim() == 1:",
        "distributed/test_window_layouts.py",
    ),
)
