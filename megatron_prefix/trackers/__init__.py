"""Trackers: where a run's metrics go (metrics.jsonl, TensorBoard, the terminal)."""

from megatron_prefix.trackers.jsonl import SamplesFile, read_metrics
from megatron_prefix.trackers.run_folder import CONFIG_FILE, EXAMPLES_FILE, VERSIONS_FILE
from megatron_prefix.trackers.several import Trackers, configured_trackers
from megatron_prefix.trackers.tracker import Status

__all__ = [
    "CONFIG_FILE",
    "EXAMPLES_FILE",
    "VERSIONS_FILE",
    "SamplesFile",
    "Status",
    "Trackers",
    "configured_trackers",
    "read_metrics",
]
