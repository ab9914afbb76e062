"""Checks of a data set: its checksums, its columns, its groups."""

from megatron_prefix.data.store.verify.checks import (
    check_structure,
    refuse_foreign_tokens,
    verify_checksums,
    verify_dataset,
    verify_tokens,
)
from megatron_prefix.data.store.verify.spans import Span, all_spans

__all__ = [
    "Span",
    "all_spans",
    "check_structure",
    "refuse_foreign_tokens",
    "verify_checksums",
    "verify_dataset",
    "verify_tokens",
]
