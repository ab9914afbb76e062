"""Trackers: where a run's metrics go (metrics.jsonl, TensorBoard, the terminal)."""

from megatron_prefix.trackers.jsonl import SamplesFile, read_metrics, read_samples
from megatron_prefix.trackers.run_folder import RunFile, read_resumes
from megatron_prefix.trackers.several import Trackers, configured_trackers
from megatron_prefix.trackers.tracker import Status

__all__ = [
    "RunFile",
    "SamplesFile",
    "Status",
    "Trackers",
    "configured_trackers",
    "read_metrics",
    "read_resumes",
    "read_samples",
]
