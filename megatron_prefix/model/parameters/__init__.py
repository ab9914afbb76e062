"""A model's parameters by canonical name: this rank's, whole ones, hashed, and as parts."""

from megatron_prefix.model.parameters.canonical import (
    base_parameters,
    canonical_parameters,
    partition_dim,
    tensor_group,
    whole_parameters,
)
from megatron_prefix.model.parameters.fingerprint import Fingerprint, model_fingerprint
from megatron_prefix.model.parameters.parts import trained_parts

__all__ = [
    "Fingerprint",
    "base_parameters",
    "canonical_parameters",
    "model_fingerprint",
    "partition_dim",
    "tensor_group",
    "trained_parts",
    "whole_parameters",
]
