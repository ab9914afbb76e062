"""Parquet and Arrow files and Hugging Face data sets, read one record at a time.

Arrow writes null if a record lacks a field that another record has. So names with a null are left
out of every record, and a column that is null counts as absent.

Parquet and Arrow are read in batches. A data set of the hub or of a directory of files is streamed;
one that `save_to_disk` wrote is memory-mapped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_prefix.data.read.whole_files import csv_remedy
from megatron_prefix.errors import InputError

BATCH = 64
"""Records of a Parquet file that are read together."""
ARROW_MAGIC = b"ARROW1"
"""What an Arrow IPC file begins with; a stream begins with four bytes 0xff."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SPLITS = "dataset_dict.json"
FILE_ENDINGS = (".json", ".jsonl", ".gz", ".zst", ".parquet", ".arrow", ".csv", ".tsv")

TableItem = tuple[int, dict[str, Any] | None, str | None]
"""Row number from 1; the record or None; the error."""


def is_dataset(path: Path) -> bool:
    """Whether an input is a Hugging Face data set: a directory, or a hub id and not a file."""
    if path.exists():
        return path.is_dir()
    return bool(HUB_ID.fullmatch(str(path))) and path.suffix not in FILE_ENDINGS


def shards_of(path: Path) -> list[Path]:
    """The files of a directory that `datasets` cannot read, in the order of their names, or none.

    That are files without an ending (part-00000), and files compressed with zstd.
    """
    if not path.is_dir() or any((path / name).exists() for name in ("state.json", SPLITS)):
        return []
    files = sorted(
        file
        for file in path.iterdir()
        if file.is_file() and file.name[0] not in "._" and file.suffix not in (".md", ".txt")
    )
    return files if any(file.suffix in ("", ".zst") for file in files) else []


def read_parquet(path: Path) -> Iterator[tuple[TableItem, float]]:
    """Every record, with the share of the file that has been read."""
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            total = max(file.metadata.num_rows, 1)
            for batch in file.iter_batches(BATCH):
                for value in batch.to_pylist():
                    number += 1
                    yield (number, without_nulls(value), None), number / total
    except (pyarrow.ArrowException, OSError) as error:
        damage = f"the Parquet file is damaged or cut off ({_first_line(error)})"
        yield (number + 1, None, damage), 1.0
        return
    if not number:
        yield (1, None, "the Parquet file contains no row"), 1.0


def read_arrow(path: Path) -> Iterator[tuple[TableItem, float]]:
    """Every record of an Arrow IPC file or stream, with the share of the file that was read."""
    import pyarrow

    number, size = 0, max(path.stat().st_size, 1)
    try:
        with pyarrow.memory_map(str(path)) as source:
            is_file = source.read(len(ARROW_MAGIC)) == ARROW_MAGIC
            source.seek(0)
            opened = pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream
            reader = opened(source)
            batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
            for batch in batches:
                for value in batch.to_pylist():
                    number += 1
                    yield (number, without_nulls(value), None), source.tell() / size
    except (pyarrow.ArrowException, OSError) as error:
        damage = f"the Arrow file is damaged or cut off ({_first_line(error)})"
        yield (number + 1, None, damage), 1.0
        return
    if not number:
        yield (1, None, "the Arrow file contains no row"), 1.0


def read_dataset(path: Path, split: str | None) -> Iterator[TableItem]:
    """Every record of one split of a data set."""
    number = 0
    try:
        for number, value in enumerate(open_dataset(path, split), 1):
            yield number, without_nulls(value), None
    except InputError:
        raise
    except Exception as error:  # many libraries raise here, at the first row of a bad file
        raise InputError(
            f"{path}: the data set cannot be read after row {number} ({_first_line(error)}): "
            "check that all its files are complete and have the same columns"
        ) from error
    if not number:
        yield 1, None, "the data set contains no row"


def open_dataset(path: Path, split: str | None) -> Any:
    """The records of one split, opened but not yet read. Raises InputError.

    If `split` is None, the data set must have only one split.
    """
    import datasets

    csv = next((file for file in path.rglob("*.[ct]sv") if file.is_file()), None)
    if csv is not None:
        raise InputError(f"{csv}: {csv_remedy(str(csv), csv.suffix == '.tsv')}")
    try:
        if (path / "state.json").is_file() or (path / SPLITS).is_file():
            dataset = datasets.load_from_disk(str(path))
        else:
            dataset = datasets.load_dataset(str(path), streaming=True)
    except Exception as error:  # many libraries raise here: the hub, its files, their readers
        raise InputError(
            f"{path} cannot be read as a Hugging Face data set ({_first_line(error)}): give a "
            "file, the directory of a data set, or the id of a data set that can be downloaded "
            "(offline, the directory of a copy)"
        ) from error
    if not hasattr(dataset, "keys"):
        if split is not None:
            raise InputError(f"--split {split}: {path} has only one split: remove the flag")
        return _undecoded(dataset)
    names = ", ".join(dataset.keys())
    if split is None and len(dataset) > 1:
        raise InputError(f"{path} has the splits {names}: choose one with --split")
    if split is not None and split not in dataset:
        raise InputError(f"--split {split}: {path} has the splits {names}: choose one of them")
    return _undecoded(dataset[split if split is not None else next(iter(dataset))])


def _undecoded(dataset: Any) -> Any:
    """The records with their images as bytes and paths, not as pictures."""
    if not _has_images(dataset.features):
        return dataset
    rows = dataset.to_iterable_dataset() if hasattr(dataset, "to_iterable_dataset") else dataset
    return rows.decode(False)


def _has_images(feature: Any) -> bool:
    """Whether a column's type is, or contains, that of images."""
    if isinstance(feature, dict):
        return any(map(_has_images, feature.values()))
    if isinstance(feature, list | tuple):
        return any(map(_has_images, feature))
    inner = getattr(feature, "feature", None)
    return type(feature).__name__ == "Image" or (inner is not None and _has_images(inner))


def without_nulls(value: Any) -> Any:
    """The same nested lists and objects without the names whose value is None."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
