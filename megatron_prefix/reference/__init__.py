"""References: frozen models or precomputed log-probabilities, and whole data sets scored."""

from megatron_prefix.reference.fingerprint import model_fingerprint
from megatron_prefix.reference.model import (
    Reference,
    frozen_model,
    open_reference,
    score_dataset,
)
from megatron_prefix.reference.sidecars import PartialScores, read_sidecar, write_sidecar

__all__ = [
    "PartialScores",
    "Reference",
    "frozen_model",
    "model_fingerprint",
    "open_reference",
    "read_sidecar",
    "score_dataset",
    "write_sidecar",
]
