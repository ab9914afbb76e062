"""The files of a data set, memory-mapped: each has the size and the shape that the manifest says.

What the columns mean is checked in verify/, by `PreferenceDataset`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_prefix.data.images import ImageStore
from megatron_prefix.data.store.blocks import Block, BlockImages
from megatron_prefix.data.store.columns import (
    OFFSETS,
    OPTIONAL_COLUMNS,
    absent_values,
    column,
    kind_of,
)
from megatron_prefix.data.store.index import DTYPES, HEADER, MAGIC
from megatron_prefix.data.store.manifest import column_file, columns_of, load_manifest, suffix_path
from megatron_prefix.errors import InputError


class MappedFiles:
    """Columns, index and tokens of a data set; `PreferenceDataset` lists and describes them.

    Raises InputError if a file is missing, or is not what the manifest describes.
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
    response_roles: np.ndarray
    response_attributes: np.ndarray
    pair_betas: np.ndarray
    node_lengths: np.ndarray
    node_pointers: np.ndarray
    documents: np.ndarray
    tokens: np.ndarray
    images: ImageStore | None
    """None without images."""

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        self.manifest = load_manifest(self.prefix)
        self._map_index()
        self._map_columns()
        described = self.manifest.get("images")
        self.images = None if described is None else ImageStore(self.prefix, described)

    def __len__(self) -> int:
        return self.manifest["counts"]["groups"]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the contents and the tokenizer; it does not depend on the location."""
        return self.manifest["fingerprint"]

    @property
    def vocab_size(self) -> int:
        return self.manifest["tokenizer"]["vocab_size"]

    @property
    def files(self) -> dict[str, Path]:
        """The files of the data set except the manifest, by their name in it."""
        return {name: suffix_path(self.prefix, name) for name in self.manifest["files"]}

    @property
    def columns(self) -> list[str]:
        """The names of the columns that the data set has."""
        return [*columns_of(self.manifest)]

    @property
    def manifest_path(self) -> Path:
        return suffix_path(self.prefix, ".json")

    def block(self, start: int, stop: int) -> Block:
        """Groups `start` to `stop` as columns."""
        # Groups 1 to 3 of group_nodes [0 3 5 9] have the nodes 3 to 9, [2 4] of them per group.
        spans = {"group": (start, stop)}
        for name in ("node", "response", "pair"):
            offsets = getattr(self, f"group_{name}s")
            spans[name] = int(offsets[start]), int(offsets[stop])
        columns = {}
        for name in self.columns:
            first, last = spans[name.split("_")[0]]
            values = getattr(self, name)
            columns[name] = (
                np.diff(values[first : last + 1]) if name in OFFSETS else values[first:last]
            )
        first, last = spans["node"]
        lengths = self.node_lengths[first:last]
        token = int(self.node_pointers[first]) // self.tokens.itemsize
        tokens = self.tokens[token : token + int(lengths.sum(dtype=np.int64))]
        images = None
        if self.images is not None:
            images = BlockImages.of_store(
                *self.images.within(token, token + len(tokens)), self.images
            )
        return Block(tokens=tokens, node_lengths=lengths, columns=columns, images=images)

    def _map_index(self) -> None:
        counts, path = self.manifest["counts"], suffix_path(self.prefix, ".idx")
        dtype = np.dtype(self.manifest["dtype"])
        with path.open("rb") as file:
            head = file.read(HEADER)
        expected = (1, counts["nodes"], counts["groups"] + 1)
        # version, number of nodes, and of group boundaries; byte 17 is the code of the tokens' type
        sizes = tuple(int.from_bytes(head[a:b], "little") for a, b in ((9, 17), (18, 26), (26, 34)))
        if head[:9] != MAGIC or sizes != expected or DTYPES.get(head[17]) != dtype:
            raise InputError(f"{path} is not the index that its manifest describes: build it again")
        nodes, at = counts["nodes"], HEADER
        layout: tuple[tuple[str, type[np.generic], int], ...] = (
            ("node_lengths", np.int32, nodes),
            ("node_pointers", np.int64, nodes),
            ("documents", np.int64, counts["groups"] + 1),
        )
        expected_size = HEADER + sum(np.dtype(kind).itemsize * n for _, kind, n in layout)
        if path.stat().st_size != expected_size:
            raise InputError(
                f"{path} has {path.stat().st_size} bytes, and its manifest asks for "
                f"{expected_size}: build the data set again"
            )
        for name, kind, length in layout:
            setattr(self, name, np.memmap(path, kind, "r", offset=at, shape=(length,)))
            at += np.dtype(kind).itemsize * length
        bin_path = suffix_path(self.prefix, ".bin")
        num_bytes, expected_bytes = bin_path.stat().st_size, counts["tokens"] * dtype.itemsize
        if num_bytes != expected_bytes:
            raise InputError(
                f"{bin_path} has {num_bytes} bytes, but its manifest asks for {expected_bytes}: "
                "build the data set again"
            )
        self.tokens = np.memmap(bin_path, dtype, "r")

    def _map_columns(self) -> None:
        counts = self.manifest["counts"]
        for name, tail in columns_of(self.manifest).items():
            path, dtype = suffix_path(self.prefix, column_file(name)), column(name).dtype
            try:
                values = np.lib.format.open_memmap(path, mode="r")
            except Exception as error:  # a damaged header can raise anything
                raise InputError(f"{path} cannot be read ({error}): build it again") from error
            shape = (counts[kind_of(name)] + (name in OFFSETS), *tail)
            if values.shape != shape or values.dtype != dtype or not values.flags.c_contiguous:
                raise InputError(
                    f"{path} is {values.dtype} {values.shape}, and {dtype} {shape} in its "
                    "manifest: build the data set again"
                )
            setattr(self, name, values)
        for name in OPTIONAL_COLUMNS.keys() - self.columns:
            setattr(self, name, absent_values(name, counts[kind_of(name)]))
