"""Trees <-> files: write a data set, open it, count what is in it."""

from megatron_prefix.data.store.blocks import Block
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.data.store.joined import check_one_vocabulary, join_datasets
from megatron_prefix.data.store.manifest import read_manifest
from megatron_prefix.data.store.manifest_keys import SHARING_TOKENS
from megatron_prefix.data.store.statistics import Histogram
from megatron_prefix.data.store.writer import DatasetWriter

__all__ = [
    "SHARING_TOKENS",
    "Block",
    "DatasetWriter",
    "Histogram",
    "PreferenceDataset",
    "check_one_vocabulary",
    "join_datasets",
    "read_manifest",
]
