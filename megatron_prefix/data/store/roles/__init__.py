"""Roles of responses: own ones, and mismatches that `build --kto` adds."""

from megatron_prefix.data.store.roles.views import (
    has_mismatches,
    mismatched_responses,
    own_responses,
    without_mismatches,
)

__all__ = ["has_mismatches", "mismatched_responses", "own_responses", "without_mismatches"]
