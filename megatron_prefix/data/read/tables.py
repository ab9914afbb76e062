"""Parquet files and Hugging Face data sets, read a row at a time.

Arrow writes a null where a row lacks a field that another row has, so nulls inside a row are
left out: a column that is null counts as absent. Parquet is read a batch of rows at a time; a
data set of the hub or of a directory of files is streamed, one that `save_to_disk` wrote is
memory-mapped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_prefix.errors import InputError

BATCH_ROWS = 64
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FILE_ENDINGS = (".json", ".jsonl", ".gz", ".zst", ".parquet")

Item = tuple[int, dict[str, Any] | None, str | None]


def is_dataset(path: Path) -> bool:
    """Whether an input is a Hugging Face data set: a directory, or a hub id and no file."""
    if path.exists():
        return path.is_dir()
    return bool(HUB_ID.fullmatch(str(path))) and path.suffix not in FILE_ENDINGS


def read_parquet(path: Path) -> Iterator[tuple[Item, float]]:
    """Every row as an item, counted from 1, with the share of the file read so far."""
    import pyarrow
    from pyarrow import parquet

    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            total = max(file.metadata.num_rows, 1)
            for batch in file.iter_batches(BATCH_ROWS):
                for value in batch.to_pylist():
                    row += 1
                    yield (row, without_nulls(value), None), row / total
    except (pyarrow.ArrowException, OSError) as error:
        yield (row + 1, None, f"the Parquet file is damaged or cut off ({_first(error)})"), 1.0
        return
    if not row:
        yield (1, None, "the Parquet file holds no row"), 1.0


def read_dataset(path: Path, split: str | None) -> Iterator[Item]:
    """Every row of a data set's split, counted from 1."""
    row = 0
    try:
        for row, value in enumerate(open_dataset(path, split), 1):
            yield row, without_nulls(value), None
    except InputError:
        raise
    except Exception as error:  # of many libraries, at whatever row a file differs
        raise InputError(
            f"{path}: the data set cannot be read behind row {row} ({_first(error)}): are all its "
            "files whole, and of the same columns?"
        ) from error
    if not row:
        yield 1, None, "the data set holds no row"


def open_dataset(path: Path, split: str | None) -> Any:
    """The rows of one split, opened and not yet read. Raises InputError.

    Without `split` the data set must have one split only.
    """
    import datasets

    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            found = datasets.load_from_disk(str(path))
        else:
            found = datasets.load_dataset(str(path), streaming=True)
    except Exception as error:  # of many libraries: the hub, its files, their readers
        raise InputError(
            f"{path} cannot be read as a Hugging Face data set ({_first(error)}): give a file, "
            "the directory of a data set, or the id of one that is in reach (offline, the "
            "directory of a copy)"
        ) from error
    if not hasattr(found, "keys"):
        if split is not None:
            raise InputError(f"--split {split}: {path} is a single split: leave the flag out")
        return found
    names = ", ".join(found.keys())
    if split is None and len(found) > 1:
        raise InputError(f"{path} has the splits {names}: name one with --split")
    if split is not None and split not in found:
        raise InputError(f"--split {split}: {path} has the splits {names}")
    return found[split if split is not None else next(iter(found))]


def without_nulls(value: Any) -> Any:
    """The same nested lists and objects without the names whose value is None."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def _first(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
