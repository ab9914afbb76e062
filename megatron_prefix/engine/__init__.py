"""The engine: rows on a device -> forward, backward, update."""

from megatron_prefix.engine.batch import TrainBatch
from megatron_prefix.engine.feed import Feed, StepRows
from megatron_prefix.engine.optimizer import Policy, build_model, build_policy
from megatron_prefix.engine.step import preference_loss, score_rows

__all__ = [
    "Feed",
    "Policy",
    "StepRows",
    "TrainBatch",
    "build_model",
    "build_policy",
    "preference_loss",
    "score_rows",
]
