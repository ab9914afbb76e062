"""Attention over packed prefix trees: one definition of visibility, several backends.

`api.py` checks and dispatches, `plan.py` turns a layout into what the backends need, `dense.py`
is the specification; `path.py`, `flash.py`, `te.py` and `flex.py` compute the same without a
token-by-token mask.
"""

from megatron_prefix.attention.api import resolve_backend, tree_attention
from megatron_prefix.attention.plan import PathPlan, TreePlan, build_path_plan

__all__ = ["PathPlan", "TreePlan", "build_path_plan", "resolve_backend", "tree_attention"]
