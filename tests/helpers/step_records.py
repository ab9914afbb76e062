"""Objectives of one pass, run in two."""

from __future__ import annotations

from dataclasses import replace

from megatron_prefix.objectives.registry import OBJECTIVES

SIGMOID = replace(OBJECTIVES["sigmoid"], name="sigmoid_in_two_passes", scope="step")
"""`sigmoid` as if it needed the whole step."""
