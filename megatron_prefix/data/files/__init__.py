"""Files that a data set or packed steps consist of: growing columns, checksums, work folders."""

from megatron_prefix.data.files.checksums import file_entry, manifest_digest, sha256
from megatron_prefix.data.files.columns import ColumnWriter, is_partition
from megatron_prefix.data.files.work_folder import (
    building_folder,
    checked_prefix,
    clear_leftovers,
)

__all__ = [
    "ColumnWriter",
    "building_folder",
    "checked_prefix",
    "clear_leftovers",
    "file_entry",
    "is_partition",
    "manifest_digest",
    "sha256",
]
