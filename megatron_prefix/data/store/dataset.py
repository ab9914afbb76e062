"""A data set on disk, memory-mapped: groups as prefix trees, blocks of groups as columns."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_prefix.data.store.blocks import Block
from megatron_prefix.data.store.columns import (
    OFFSETS,
    OPTIONAL_COLUMNS,
    absent_values,
    column,
    kind_of,
)
from megatron_prefix.data.store.index import DTYPES, HEADER, MAGIC
from megatron_prefix.data.store.manifest import column_file, columns_of, load_manifest, suffix_path
from megatron_prefix.data.tree import PrefixTree
from megatron_prefix.errors import InputError


class PreferenceDataset:
    """A data set that `build` wrote, memory-mapped: `dataset[i]` is group i as a PrefixTree.

    The columns of docs/data_format.md are attributes: `group_nodes` [G+1], `group_responses`
    [G+1], `group_pairs` [G+1], `group_records`, `group_num_records` [G], `node_parents` [M],
    `response_first`, `response_last`, `response_lengths`, `response_prompts`, `response_sets`,
    `response_ranks`, `response_scores` [R], `pair_responses` [P, 2], `pair_weights`,
    `pair_margins` [P], and the optional `response_roles` [R], `response_attributes` [R, A] and
    `pair_betas` [P], whose entries have one stated value if the data set lacks them. So are
    `node_lengths` [M] and `node_pointers` [M] (bytes) of the index, and `tokens` [T].

    Opening checks that every file exists and has its size and shape. `verify_checksums(dataset)`
    reads all bytes, and `verify_dataset(dataset)` also checks what they mean. All raise InputError.
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

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        self.manifest = load_manifest(self.prefix)
        self._map_index()
        self._map_columns()

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
    def parts(self) -> tuple[PreferenceDataset, ...]:
        """The data sets that this one joins (joined.py), or it alone."""
        return (self,)

    def locate(self, group: int) -> tuple[PreferenceDataset, int]:
        """The part with group `group`, and the group's number in it."""
        return self, group

    def place(self, group: int) -> str:
        """A group in messages: "group 3 of PREFIX"."""
        part, local = self.locate(int(group))
        return f"group {local} of {part.prefix}"

    @property
    def manifest_path(self) -> Path:
        return suffix_path(self.prefix, ".json")

    def __getitem__(self, group: int) -> PrefixTree:
        group = self._checked(group)
        m0, m1 = (int(x) for x in self.group_nodes[group : group + 2])
        r0, r1 = (int(x) for x in self.group_responses[group : group + 2])
        p0, p1 = (int(x) for x in self.group_pairs[group : group + 2])
        offsets = np.zeros(m1 - m0 + 1, np.int64)
        np.cumsum(self.node_lengths[m0:m1], out=offsets[1:])
        # Pointers count bytes: with 2 bytes per token, pointer 12 is token 6.
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
            pair_betas=np.array(self.pair_betas[p0:p1]),
        )

    def group_num_tokens(self, group: int) -> int:
        """Tokens of a group as a tree."""
        group = self._checked(group)
        m0, m1 = (int(x) for x in self.group_nodes[group : group + 2])
        end = int(self.node_pointers[m1]) if m1 < len(self.node_pointers) else self.tokens.nbytes
        return (end - int(self.node_pointers[m0])) // self.tokens.itemsize

    def groups_num_tokens(self) -> np.ndarray:
        """Tokens of every group as a tree, int64 [G]."""
        # Pointers [0 6 10] of 18 bytes, 2 per token, group_nodes [0 2 3]: the groups begin at bytes
        # [0 10] and the last ends at 18, so they have 5 and 4 tokens.
        ends = np.append(self.node_pointers, self.tokens.nbytes)
        return np.diff(ends[self.group_nodes]) // self.tokens.itemsize

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
        return Block(tokens=tokens, node_lengths=lengths, columns=columns)

    comparisons: str = "all"
    """Which of the pairs are there; see steps/compositions/comparisons.py."""
    whole: PreferenceDataset | None = None
    """The data set with all pairs, if some are left out."""
    pair_numbers: np.ndarray | None = None
    """The number of each pair among all of the whole data set, [P]; None if none is left out."""

    def __reduce__(self) -> tuple[type[PreferenceDataset], tuple[Path]]:
        if self.comparisons != "all":
            raise TypeError(f"{self.prefix} with {self.comparisons} of its pairs cannot be pickled")
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
        # version, number of nodes, and of group boundaries; byte 17 is the code of the tokens' type
        sizes = tuple(int.from_bytes(head[a:b], "little") for a, b in ((9, 17), (18, 26), (26, 34)))
        if head[:9] != MAGIC or sizes != expected or DTYPES.get(head[17]) != dtype:
            raise InputError(f"{path} is not the index that its manifest describes: build it again")
        nodes = counts["nodes"]
        layout = (("node_lengths", np.int32, nodes), ("node_pointers", np.int64, nodes))
        at = HEADER
        for name, kind, length in (*layout, ("documents", np.int64, counts["groups"] + 1)):
            if at + np.dtype(kind).itemsize * length > path.stat().st_size:
                raise InputError(f"{path} is cut off: build the data set again")
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
                values = np.load(path, mmap_mode="r", allow_pickle=False)
            except Exception as error:  # a damaged header can raise anything
                raise InputError(f"{path} cannot be read ({error}): build it again") from error
            shape = (counts[kind_of(name)] + (name in OFFSETS), *tail)
            if values.shape != shape or values.dtype != dtype:
                raise InputError(
                    f"{path} is {values.dtype} {values.shape}, and {dtype} {shape} in its "
                    "manifest: build the data set again"
                )
            setattr(self, name, values)
        for name in OPTIONAL_COLUMNS.keys() - self.columns:
            setattr(self, name, absent_values(name, counts[kind_of(name)]))
