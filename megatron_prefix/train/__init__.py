"""The training run, evaluation and scoring, each from a configuration to its result."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_prefix.faces import lazy_face

if TYPE_CHECKING:
    from megatron_prefix.train.data_checks import check_columns, run_sharing
    from megatron_prefix.train.evaluation import evaluate
    from megatron_prefix.train.run import train
    from megatron_prefix.train.samplers import open_on_nodes, plan_settings, training_sampler
    from megatron_prefix.train.scoring import score_reference
else:
    __getattr__ = lazy_face(
        __name__,
        data_checks=["check_columns", "run_sharing"],
        evaluation=["evaluate"],
        run=["train"],
        samplers=["open_on_nodes", "plan_settings", "training_sampler"],
        scoring=["score_reference"],
    )

__all__ = [
    "check_columns",
    "evaluate",
    "open_on_nodes",
    "plan_settings",
    "run_sharing",
    "score_reference",
    "train",
    "training_sampler",
]
