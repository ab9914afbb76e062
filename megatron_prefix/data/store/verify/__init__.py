"""Checks of a data set: its checksums, its columns, its groups."""

from megatron_prefix.data.store.verify.checks import (
    sound_spans,
    verify_checksums,
    verify_dataset,
    verify_group,
    verify_offsets,
)
from megatron_prefix.data.store.verify.spans import Span

__all__ = [
    "Span",
    "sound_spans",
    "verify_checksums",
    "verify_dataset",
    "verify_group",
    "verify_offsets",
]
