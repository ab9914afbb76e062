"""A run, or several side by side, as one HTML page without anything from the network."""

from megatron_prefix.report.page import compare_runs, report_run
from megatron_prefix.report.record import RunRecord

__all__ = ["RunRecord", "compare_runs", "report_run"]
