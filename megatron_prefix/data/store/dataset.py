"""Trees <-> files. docs/data_format.md has every byte of it.

    PREFIX.bin, PREFIX.idx   Megatron-Core's indexed format: a sequence a node, a document a group
    PREFIX.tree/*.npy        columns: what the tokens mean, memory-mapped when read
    PREFIX.json              the manifest, written last: counts, tokenizer, checksums

A data set is written into a directory of its own beside PREFIX and moved into place at the end,
the manifest last; without a manifest nothing is read. Writing holds one block of groups, reading
what is touched.
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

from megatron_prefix.data.store.blocks import Block, starts
from megatron_prefix.data.store.columns import COLUMNS, OFFSETS, ColumnWriter, file_entry
from megatron_prefix.data.store.index import DTYPES, HEADER, MAGIC, IndexedWriter
from megatron_prefix.data.store.manifest import (
    FILES,
    FORMAT,
    VERSION,
    fingerprint,
    load_manifest,
    manifest_digest,
    suffix_path,
)
from megatron_prefix.data.store.statistics import Statistics
from megatron_prefix.data.store.work_folder import building_folder, checked_prefix, clear_leftovers
from megatron_prefix.data.tree import PrefixTree
from megatron_prefix.errors import InputError

BLOCK = 256
"""Groups that `add` holds before they are written."""


class DatasetWriter:
    """Writes one data set, or nothing: a context manager.

        with DatasetWriter(prefix, tokenizer.describe()) as writer:
            writer.add(tree, record=0)
            writer.finish()

    Leaving it without `finish`, by an exception or not, removes everything it made. An earlier
    data set under the same prefix stays until `finish` replaces it. Raises InputError where the
    place cannot be written or a token id does not fit the vocabulary.
    """

    def __init__(
        self,
        prefix: str | Path,
        tokenizer: Mapping[str, Any],
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.prefix = checked_prefix(prefix)
        self.tokenizer = dict(tokenizer)
        self.options = dict(options or {})
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
        """Of all that was added."""
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
        """Append groups that come behind all that were added before."""
        self._flush()
        self._write(block)

    def _flush(self) -> None:
        trees, records = self._waiting
        self._waiting = [], []
        if trees:
            self._write(Block.of_trees(trees, records))

    def _write(self, block: Block) -> None:
        vocab_size = self.tokenizer["vocab_size"]
        low, high = int(block.tokens.min()), int(block.tokens.max())
        if low < 0 or high >= vocab_size:
            at = int(np.flatnonzero((block.tokens < 0) | (block.tokens >= vocab_size))[0])
            ends = np.cumsum(
                np.add.reduceat(block.node_lengths, starts(block.columns["group_nodes"]))
            )
            record = block.columns["group_records"][np.searchsorted(ends, at, "right")]
            raise InputError(
                f"record {record} has token id {block.tokens[at]}, and the vocabulary of "
                f"tokenizer {self.tokenizer['name']} has {vocab_size}: the tokenizer is damaged"
            )
        if self._index is None:
            self._open()
        before = dict(self._statistics.counts)
        self._statistics.add(block)
        self._index.write(block.tokens, block.node_lengths)
        for name, column in self._columns.items():
            values = block.columns[name]
            if name in OFFSETS:
                values = before[name.split("_")[1]] + np.cumsum(values)
            column.write(values)

    def finish(self, report: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Put the data set in its place and return its manifest, which keeps `report`."""
        self._flush()
        if self._index is None:
            raise InputError(f"nothing is left to write to {self.prefix}: no group has a pair")
        for column in self._columns.values():
            column.close()
        self._index.finish(np.load(self._work / "tree" / "group_nodes.npy", mmap_mode="r"))
        files = {name: file_entry(self._work / name[1:]) for name in FILES}
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": fingerprint(files, self.tokenizer),
            "counts": self._statistics.counts,
            "tokens": self._statistics.tokens,
            "lengths": self._statistics.lengths(),
            "dtype": np.dtype(self.dtype).name,
            "tokenizer": self.tokenizer,
            "options": self.options,
            "report": dict(report or {}),
            "files": files,
        }
        manifest["sha256"] = manifest_digest(manifest)
        with (self._work / "json").open("w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=1, allow_nan=False)
            file.write("\n")
        for name in (*FILES, ".json"):
            with (self._work / name[1:]).open("rb") as file:
                os.fsync(file.fileno())
        self._move()
        self._made.clear()
        return manifest

    def _open(self) -> None:
        self._index = IndexedWriter(self._work, self.dtype)
        for name, (dtype, tail) in COLUMNS.items():
            self._columns[name] = ColumnWriter(self._work / "tree" / f"{name}.npy", dtype, tail)
        for name in OFFSETS:
            self._columns[name].write([0])

    def _move(self) -> None:
        """Take the old manifest away, replace the files, and put the new manifest last."""
        suffix_path(self.prefix, ".json").unlink(missing_ok=True)
        for suffix in (".bin", ".idx"):
            os.replace(self._work / suffix[1:], suffix_path(self.prefix, suffix))
        tree = suffix_path(self.prefix, ".tree")
        if tree.exists():
            os.replace(tree, self._work / "old")
        os.replace(self._work / "tree", tree)
        os.replace(self._work / "json", suffix_path(self.prefix, ".json"))

    def _discard(self) -> None:
        files = [] if self._index is None else [self._index]
        for file in (*files, *self._columns.values()):
            with contextlib.suppress(OSError):  # a full disk does not take the rest of a buffer
                file.close()
        shutil.rmtree(self._work, ignore_errors=True)
        while self._made:
            try:
                self._made.pop().rmdir()
            except OSError:  # somebody else put something into it
                return


class PreferenceDataset:
    """A data set as `build` leaves it, memory-mapped: `dataset[i]` is group i as a PrefixTree.

    The columns of docs/data_format.md are attributes: `group_nodes` [G+1], `group_responses`
    [G+1], `group_pairs` [G+1], `group_records`, `group_num_records` [G], `node_parents` [M],
    `response_first`, `response_last`, `response_lengths`, `response_prompts`, `response_sets`,
    `response_ranks`, `response_scores` [R], `pair_responses` [P, 2], `pair_weights`,
    `pair_margins` [P]; so are `node_lengths` [M] and `node_pointers` [M] (bytes) of the index, and
    `tokens` [T].

    Opening checks that every file is there, with its size and shape; `verify_checksums` reads
    all bytes, `verify` also checks what they mean. All raise InputError.
    """

    group_nodes: np.ndarray
    group_responses: np.ndarray
    group_pairs: np.ndarray
    group_records: np.ndarray
    group_num_records: np.ndarray
    node_parents: np.ndarray
    response_first: np.ndarray
    response_last: np.ndarray
    response_lengths: np.ndarray
    response_prompts: np.ndarray
    response_sets: np.ndarray
    response_ranks: np.ndarray
    response_scores: np.ndarray
    pair_responses: np.ndarray
    pair_weights: np.ndarray
    pair_margins: np.ndarray
    node_lengths: np.ndarray
    node_pointers: np.ndarray
    documents: np.ndarray
    tokens: np.ndarray

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        self.manifest = load_manifest(self.prefix)
        self._map_index()
        self._map_columns()

    def __len__(self) -> int:
        return self.manifest["counts"]["groups"]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the contents and the tokenizer; the same wherever the data set lies."""
        return self.manifest["fingerprint"]

    @property
    def vocab_size(self) -> int:
        return self.manifest["tokenizer"]["vocab_size"]

    def __getitem__(self, group: int) -> PrefixTree:
        group = self._checked(group)
        m0, m1 = (int(x) for x in self.group_nodes[group : group + 2])
        r0, r1 = (int(x) for x in self.group_responses[group : group + 2])
        p0, p1 = (int(x) for x in self.group_pairs[group : group + 2])
        offsets = np.zeros(m1 - m0 + 1, np.int64)
        np.cumsum(self.node_lengths[m0:m1], out=offsets[1:])
        start = int(self.node_pointers[m0]) // self.tokens.itemsize
        return PrefixTree(
            tokens=np.array(self.tokens[start : start + int(offsets[-1])], np.int64),
            node_offsets=offsets,
            parents=np.array(self.node_parents[m0:m1]),
            response_first=np.array(self.response_first[r0:r1]),
            response_last=np.array(self.response_last[r0:r1]),
            response_sets=np.array(self.response_sets[r0:r1]),
            ranks=np.array(self.response_ranks[r0:r1]),
            scores=np.array(self.response_scores[r0:r1]),
            pairs=np.array(self.pair_responses[p0:p1]),
            pair_weights=np.array(self.pair_weights[p0:p1]),
            pair_margins=np.array(self.pair_margins[p0:p1]),
        )

    def group_num_tokens(self, group: int) -> int:
        """Tokens of a group as a tree."""
        group = self._checked(group)
        m0, m1 = (int(x) for x in self.group_nodes[group : group + 2])
        end = int(self.node_pointers[m1]) if m1 < len(self.node_pointers) else self.tokens.nbytes
        return (end - int(self.node_pointers[m0])) // self.tokens.itemsize

    def groups_num_tokens(self) -> np.ndarray:
        """Tokens of every group as a tree, int64 [G]."""
        ends = np.append(self.node_pointers, self.tokens.nbytes)
        return np.diff(ends[self.group_nodes]) // self.tokens.itemsize

    def verify_checksums(self) -> None:
        """Read every file and compare it with the manifest's SHA-256."""
        from megatron_prefix.data.store.verify import verify_checksums

        verify_checksums(self)

    def verify(self) -> None:
        """Check the checksums and every invariant of the layout."""
        from megatron_prefix.data.store.verify import verify_files, verify_layout, verify_manifest

        verify_files(self)
        verify_layout(self)
        verify_manifest(self)

    def __reduce__(self) -> tuple[type[PreferenceDataset], tuple[Path]]:
        return PreferenceDataset, (self.prefix,)

    def _checked(self, group: int) -> int:
        if not 0 <= group < len(self):
            raise IndexError(f"group {group} of a data set of {len(self)} groups")
        return int(group)

    def _map_index(self) -> None:
        counts, path = self.manifest["counts"], suffix_path(self.prefix, ".idx")
        dtype = np.dtype(self.manifest["dtype"])
        with path.open("rb") as file:
            head = file.read(HEADER)
        expected = (1, counts["nodes"], counts["groups"] + 1)
        found = tuple(int.from_bytes(head[a:b], "little") for a, b in ((9, 17), (18, 26), (26, 34)))
        if head[:9] != MAGIC or found != expected or DTYPES.get(head[17]) != dtype:
            raise InputError(f"{path} is not the index its manifest describes: build it again")
        nodes = counts["nodes"]
        layout = (("node_lengths", np.int32, nodes), ("node_pointers", np.int64, nodes))
        at = HEADER
        for name, kind, length in (*layout, ("documents", np.int64, counts["groups"] + 1)):
            if at + np.dtype(kind).itemsize * length > path.stat().st_size:
                raise InputError(f"{path} is cut off: build the data set again")
            setattr(self, name, np.memmap(path, kind, "r", offset=at, shape=(length,)))
            at += np.dtype(kind).itemsize * length
        self.tokens = np.memmap(suffix_path(self.prefix, ".bin"), dtype, "r")
        if len(self.tokens) != counts["tokens"]:
            raise InputError(
                f"{self.prefix}.bin holds {len(self.tokens)} tokens, its manifest says "
                f"{counts['tokens']}: build the data set again"
            )

    def _map_columns(self) -> None:
        counts = self.manifest["counts"]
        for name, (dtype, tail) in COLUMNS.items():
            path = suffix_path(self.prefix, f".tree/{name}.npy")
            try:
                column = np.load(path, mmap_mode="r", allow_pickle=False)
            except Exception as error:  # whatever a damaged header makes NumPy raise
                raise InputError(f"{path} cannot be read ({error}): build it again") from error
            kind = name.split("_")[0] + "s"
            shape = (counts[kind] + (name in OFFSETS), *tail)
            if column.shape != shape or column.dtype != dtype:
                raise InputError(
                    f"{path} is {column.dtype} {column.shape}, its manifest asks for {dtype} "
                    f"{shape}: build the data set again"
                )
            setattr(self, name, column)
