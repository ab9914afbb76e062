"""Raw preferences -> a data set on disk, and data sets built in parts -> one data set."""

from __future__ import annotations

from megatron_prefix.data.build.builder import build_dataset
from megatron_prefix.data.build.from_hf import from_hf_dataset
from megatron_prefix.data.build.merge_parts import merge_datasets
from megatron_prefix.data.build.options import BuildOptions

__all__ = ["BuildOptions", "build_dataset", "from_hf_dataset", "merge_datasets"]
