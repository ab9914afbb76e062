"""Several data sets as one: the groups of the first, then those of the second, and so on.

Sets of 3 and 2 groups: groups 0 to 2 are the first's, groups 3 and 4 are groups 0 and 1 of the
second. Columns are joined when they are first read, into memory; tokens stay in their files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prefix.data.images import JoinedImages
from megatron_prefix.data.store.blocks import Block
from megatron_prefix.data.store.columns import COLUMNS, OFFSETS, OPTIONAL_COLUMNS
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.data.store.manifest_keys import COUNTS
from megatron_prefix.data.tree import PrefixTree
from megatron_prefix.data.tree_images import NO_IMAGES
from megatron_prefix.errors import InputError

JOINED = (*COLUMNS, *OPTIONAL_COLUMNS, "node_lengths")


class JoinedDataset(PreferenceDataset):
    """What steps, rows and references read of a data set, for `parts` one after another.

    `fingerprint` is a function of those of the parts, in their order. `tokens`, `node_pointers` and
    `files` are the parts' own. Raises InputError if the parts have different vocabularies.
    """

    def __init__(self, parts: Sequence[PreferenceDataset]) -> None:
        check_one_vocabulary(parts)
        self._parts = tuple(parts)
        self._ends = np.cumsum([len(part) for part in parts])
        self.prefix = Path(", ".join(str(part.prefix) for part in parts))
        lines = "".join(f"{part.fingerprint}\n" for part in parts)
        self.manifest: dict[str, Any] = {
            "fingerprint": hashlib.sha256(f"joined\n{lines}".encode()).hexdigest(),
            "tokenizer": parts[0].manifest["tokenizer"],
            "counts": {
                name: sum(part.manifest["counts"][name] for part in parts) for name in COUNTS
            },
        }
        stores = [part.images for part in parts]
        self.images = JoinedImages(stores) if any(x is not None for x in stores) else None

    @property
    def parts(self) -> tuple[PreferenceDataset, ...]:
        return self._parts

    @property
    def files(self) -> dict[str, Path]:
        raise NotImplementedError("the files of joined data sets are those of their parts")

    @property
    def columns(self) -> list[str]:
        return [*COLUMNS, *(n for n in OPTIONAL_COLUMNS if any(n in p.columns for p in self.parts))]

    def __getattr__(self, name: str) -> np.ndarray:
        if name not in JOINED:
            raise AttributeError(f"joined data sets have no attribute {name!r}")
        columns = [np.asarray(getattr(part, name)) for part in self.parts]
        if name in OFFSETS:
            # Offsets [0, 2, 5] and [0, 1]: the second begins at 5, so [0, 2, 5, 6].
            starts = np.cumsum([0, *(column[-1] for column in columns)])
            shifted = [c[1:] + start for c, start in zip(columns, starts[:-1], strict=True)]
            joined = np.concatenate([[0], *shifted]).astype(columns[0].dtype)
        elif len({column.shape[1:] for column in columns}) > 1:
            raise InputError(
                f"{self.prefix}: {name} has entries of shapes "
                f"{', '.join(str(column.shape[1:]) for column in columns)}: train on data sets "
                "with the same attributes"
            )
        else:
            joined = np.concatenate(columns)
        joined.flags.writeable = False
        setattr(self, name, joined)
        return joined

    def __getitem__(self, group: int) -> PrefixTree:
        index = self._index(self._checked(group))
        part, local = self.locate(group)
        tree = part[local]
        if self.images is None:
            return tree
        assert isinstance(self.images, JoinedImages)
        images = NO_IMAGES if tree.images is None else tree.images
        ids = images.ids + int(self.images.firsts[index])
        return replace(tree, images=replace(images, ids=ids))

    def locate(self, group: int) -> tuple[PreferenceDataset, int]:
        index = self._index(group)
        return self.parts[index], int(group) - int(self._ends[index]) + len(self.parts[index])

    def _index(self, group: int) -> int:
        return int(np.searchsorted(self._ends, group, "right"))

    def group_num_tokens(self, group: int) -> int:
        part, local = self.locate(self._checked(group))
        return part.group_num_tokens(local)

    def groups_num_tokens(self) -> np.ndarray:
        return np.concatenate([part.groups_num_tokens() for part in self.parts])

    def block(self, start: int, stop: int) -> Block:
        raise NotImplementedError("read blocks of the parts of joined data sets")

    def __reduce__(self) -> tuple[type, tuple]:
        return JoinedDataset, (self.parts,)


def check_one_vocabulary(datasets: Sequence[PreferenceDataset]) -> None:
    """Refuse data sets in which an id may mean different tokens. Raises InputError.

    Data sets of version 2 do not know their vocabulary: their tokenizers must be the same, chat
    templates included.
    """
    for other in datasets[1:]:
        ours, theirs = (data.manifest["tokenizer"] for data in (datasets[0], other))
        both_know = "vocabulary" in ours and "vocabulary" in theirs
        key = "vocabulary" if both_know else "fingerprint"
        if ours[key] != theirs[key]:
            names = [
                f"{data.prefix} has tokenizer {entry['name']} ({entry['vocab_size']} entries, "
                f"{key} {entry[key][:16]}…)"
                for data, entry in ((datasets[0], ours), (other, theirs))
            ]
            raise InputError(f"{' and '.join(names)}: build all data sets with one tokenizer")


def join_datasets(parts: Sequence[PreferenceDataset]) -> PreferenceDataset:
    """The one data set, or several joined."""
    return parts[0] if len(parts) == 1 else JoinedDataset(parts)
