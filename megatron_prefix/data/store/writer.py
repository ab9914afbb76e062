"""Trees -> files. docs/data_format.md describes every byte.

    PREFIX.bin, PREFIX.idx   Megatron-Core's indexed format: nodes are sequences, groups documents
    PREFIX.tree/*.npy        columns: what the tokens mean, memory-mapped when read
    PREFIX.images            the encoded bytes of images, if there are any
    PREFIX.json              the manifest, written last: counts, tokenizer, checksums

A data set is written into a work folder next to PREFIX and moved into place at the end, the
manifest last. Without a manifest nothing is read. Writing holds one block of groups in memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from megatron_prefix.data.files import (
    ColumnWriter,
    building_folder,
    checked_prefix,
    clear_leftovers,
    file_entry,
    manifest_digest,
)
from megatron_prefix.data.images import ImageStore, ImageWriter
from megatron_prefix.data.store.blocks import Block, BlockImages, starts
from megatron_prefix.data.store.columns import (
    COLUMNS,
    OFFSETS,
    absent_values,
    column,
    kind_of,
    least_tail,
)
from megatron_prefix.data.store.index import IndexedWriter
from megatron_prefix.data.store.manifest import (
    FORMAT,
    INDEXED_FILES,
    VERSION,
    column_file,
    describe_columns,
    fingerprint,
    suffix_path,
)
from megatron_prefix.data.store.statistics import Statistics
from megatron_prefix.data.tree import PrefixTree
from megatron_prefix.errors import InputError

BLOCK = 256
"""Groups that `add` collects before it writes them."""


class DatasetWriter:
    """Writes one data set, or nothing: a context manager.

        with DatasetWriter(prefix, tokenizer.describe()) as writer:
            writer.add(tree, record=0)
            writer.finish()

    Leaving it without `finish`, by an exception or not, removes everything it made. An earlier
    data set under the same prefix stays until `finish` replaces it. Raises InputError if the files
    cannot be written, or if a token id is not in the vocabulary. `images` are those of the trees
    that `add` gets.
    """

    def __init__(
        self,
        prefix: str | Path,
        tokenizer: Mapping[str, Any],
        options: Mapping[str, Any] | None = None,
        images: ImageStore | None = None,
    ) -> None:
        self.prefix = checked_prefix(prefix)
        self.tokenizer = dict(tokenizer)
        self.options = dict(options or {})
        self._source_images = images
        self._images: ImageWriter | None = None
        self._statistics = Statistics()
        self.dtype = np.uint16 if self.tokenizer["vocab_size"] <= 1 << 16 else np.int32
        self._work = building_folder(self.prefix)
        self._made: list[Path] = []
        self._columns: dict[str, ColumnWriter] = {}
        self._index: IndexedWriter | None = None
        self._waiting: tuple[list[PrefixTree], list[tuple[int, int]]] = [], []

    def __enter__(self) -> DatasetWriter:
        try:
            for parent in reversed([d for d in self.prefix.parents if not d.exists()]):
                parent.mkdir()
                self._made.append(parent)
            clear_leftovers(self.prefix)
            shutil.rmtree(self._work, ignore_errors=True)
            (self._work / "tree").mkdir(parents=True)
        except OSError as error:
            self._discard()
            raise InputError(f"output {self.prefix} cannot be written: {error}") from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._discard()
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            raise InputError(f"output {self.prefix} cannot be written: {error}") from error

    @property
    def statistics(self) -> Statistics:
        """Statistics of all groups that were added."""
        self._flush()
        return self._statistics

    def add(self, tree: PrefixTree, record: int, num_records: int = 1) -> None:
        """Append one group; `record` is the index of the (first) input record it comes from."""
        trees, records = self._waiting
        trees.append(tree)
        records.append((record, num_records))
        if len(trees) == BLOCK:
            self._flush()

    def add_block(self, block: Block) -> None:
        """Append all groups of a block."""
        self._flush()
        self._write(block)

    def _flush(self) -> None:
        trees, records = self._waiting
        self._waiting = [], []
        if trees:
            self._write(Block.of_trees(trees, records, self._source_images))

    def _write(self, block: Block) -> None:
        vocab_size = self.tokenizer["vocab_size"]
        low, high = int(block.tokens.min()), int(block.tokens.max())
        if low < 0 or high >= vocab_size:
            # Groups of 3 and 4 tokens: ends [3 7]. Token 2 is in group 0, token 3 in group 1.
            at = int(np.flatnonzero((block.tokens < 0) | (block.tokens >= vocab_size))[0])
            ends = np.cumsum(
                np.add.reduceat(block.node_lengths, starts(block.columns["group_nodes"]))
            )
            record = block.columns["group_records"][np.searchsorted(ends, at, "right")]
            raise InputError(
                f"record {record} has token id {block.tokens[at]}, and tokenizer "
                f"{self.tokenizer['name']} has ids 0 to {vocab_size - 1}, so its files are "
                "damaged: copy them again"
            )
        if self._index is None:
            self._index = self._opened()
        before = dict(self._statistics.counts)
        self._statistics.add(block)
        self._index.write(block.tokens, block.node_lengths)
        if block.images is not None and len(block.images.ids):
            self._write_images(block.images, before["tokens"])
        for name in [name for name in block.columns if name not in self._columns]:
            self._open_optional(name, block.columns[name].shape[1:], before)
        for name, file in self._columns.items():
            if name in OFFSETS:
                # After 5 nodes, groups of 3 and 2 nodes end at the offsets [8 10].
                values = before[name.split("_")[1]] + np.cumsum(block.columns[name])
            elif name in block.columns:
                values = block.columns[name]
                if values.shape[1:] != file.tail:
                    raise InputError(
                        f"output {self.prefix}: {name} has entries of shape {values.shape[1:]} and "
                        f"had {file.tail} before: build all parts with the same columns"
                    )
            else:
                count = self._statistics.counts[kind_of(name)] - before[kind_of(name)]
                values = absent_values(name, count, file.tail)
            file.write(values)

    def _write_images(self, images: BlockImages, tokens_before: int) -> None:
        if self._images is None:
            self._images = ImageWriter(self._work, images.processor)
        starts_O = images.starts + tokens_before
        self._images.add(images.pictures, images.ids, starts_O, images.processor)

    def _open_optional(self, name: str, tail: tuple[int, ...], before: dict[str, int]) -> None:
        """Begin an optional column with the groups that were written without it."""
        dtype = column(name).dtype
        self._columns[name] = ColumnWriter(self._work / "tree" / f"{name}.npy", dtype, tail)
        self._columns[name].write(absent_values(name, before[kind_of(name)], tail))

    def finish(self, report: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Move the data set into place and return its manifest, which keeps `report`."""
        manifest = self.complete(report)
        self.publish()
        return manifest

    def complete(self, report: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Write everything that is missing into the work folder and return the manifest."""
        self._flush()
        if self._index is None:
            raise InputError(
                f"output {self.prefix} would be empty, because no group has a pair: give records "
                "with responses to compare"
            )
        for values in self._columns.values():
            values.close()
        self._index.finish(self._work / "tree" / "group_nodes.npy")
        tails = {name: self._columns[name].tail for name in self._columns}
        names = (*INDEXED_FILES, *map(column_file, tails))
        images = None if self._images is None else self._images.finish()
        names = names if images is None else (*names, *ImageStore.FILES)
        files = {name: file_entry(self._work / name[1:]) for name in names}
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": fingerprint(files, self.tokenizer, images),
            "counts": self._statistics.counts,
            "tokens": self._statistics.tokens,
            "lengths": self._statistics.lengths(),
            "columns": describe_columns(tails),
            "dtype": np.dtype(self.dtype).name,
            "tokenizer": self.tokenizer,
            "options": self.options,
            "report": dict(report or {}),
            "files": files,
            **({} if images is None else {"images": images}),
        }
        manifest["sha256"] = manifest_digest(manifest)
        with (self._work / "json").open("w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=1, allow_nan=False)
            file.write("\n")
        for name in (*names, ".json"):
            with (self._work / name[1:]).open("rb") as file:
                os.fsync(file.fileno())
        return manifest

    def publish(self) -> None:
        """Move the completed data set into place."""
        self._move()
        self._made.clear()

    def _opened(self) -> IndexedWriter:
        """Open all files; the index is returned."""
        for name, about in COLUMNS.items():
            path = self._work / "tree" / f"{name}.npy"
            self._columns[name] = ColumnWriter(path, about.dtype, least_tail(name))
        for name in OFFSETS:
            self._columns[name].write([0])
        return IndexedWriter(self._work, self.dtype)

    def _move(self) -> None:
        """Remove the old manifest, replace the files, and write the new manifest last."""
        suffixes = INDEXED_FILES if self._images is None else (*INDEXED_FILES, ".images")
        suffix_path(self.prefix, ".json").unlink(missing_ok=True)
        if self._images is None:
            suffix_path(self.prefix, ".images").unlink(missing_ok=True)
        for suffix in suffixes:
            os.replace(self._work / suffix[1:], suffix_path(self.prefix, suffix))
        tree = suffix_path(self.prefix, ".tree")
        if tree.exists():
            os.replace(tree, self._work / "old")
        os.replace(self._work / "tree", tree)
        os.replace(self._work / "json", suffix_path(self.prefix, ".json"))

    def _discard(self) -> None:
        open_files: list[IndexedWriter | ColumnWriter] = list(self._columns.values())
        if self._index is not None:
            open_files.append(self._index)
        if self._images is not None:
            self._images.close()
        for file in open_files:
            with contextlib.suppress(OSError):  # a full disk may refuse the rest of a buffer
                file.close()
        shutil.rmtree(self._work, ignore_errors=True)
        while self._made:
            try:
                self._made.pop().rmdir()
            except OSError:  # another process has written into it
                return
