"""Mutants of the model families; see `mutants.py`."""

from __future__ import annotations

from mutant_list import Mutant

MODEL_MUTANTS = (
    Mutant(
        "mean of a norm over all heads not summed over tensor-parallel ranks",
        "model/layers/norm.py",
        "torch.distributed.all_reduce(total, group=ctx.group)",
        "pass",
        "distributed/test_family_layouts.py",
    ),
    Mutant(
        "layers without rotation are rotated",
        "attention/megatron.py",
        'if rotation is not None and self.rotary != "none":',
        "if rotation is not None:",
        "numerics/test_family_parity.py",
    ),
    Mutant(
        "yarn starts to divide one pair of channels later",
        "model/layers/rope.py",
        "first, last = max(first, 0), min(last, head_dim - 1)",
        "first, last = max(first, 0) + 1, min(last, head_dim - 1)",
        "numerics/test_family_parity.py",
    ),
    Mutant(
        "queries of Ministral 3 do not grow with their position",
        "attention/megatron.py",
        "query, key = rotate_query(query, rotation), rotate(key, rotation)",
        "query, key = rotate(query, rotation), rotate(key, rotation)",
        "numerics/test_family_parity.py",
    ),
    Mutant(
        "a checkpoint with another sliding window is taken",
        "checkpoint/model_weights.py",
        '"window_size": None if window is None else list(window),',
        '"window_size": None,',
        "numerics/test_resume.py",
    ),
    Mutant(
        "paths beyond the original context of longrope are taken",
        "checkpoint/starting_model.py",
        "if scaling is not None and limit is not None and longest > limit:",
        "if False:",
        "unit/checkpoint/test_starting_model.py",
    ),
)
