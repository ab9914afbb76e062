"""References: frozen models or precomputed log-probabilities, and whole data sets scored."""

from megatron_prefix.reference.model import (
    PrecomputedReference,
    Reference,
    frozen_model,
    open_reference,
    reference_fingerprint,
)
from megatron_prefix.reference.scoring import score_dataset
from megatron_prefix.reference.sidecars import PartialScores, write_sidecar

__all__ = [
    "PartialScores",
    "PrecomputedReference",
    "Reference",
    "frozen_model",
    "open_reference",
    "reference_fingerprint",
    "score_dataset",
    "write_sidecar",
]
