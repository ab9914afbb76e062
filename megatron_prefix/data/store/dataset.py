"""A data set on disk, memory-mapped: groups as prefix trees, blocks of groups as columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from megatron_prefix.data.store.blocks import Block
from megatron_prefix.data.store.mapped import MappedFiles
from megatron_prefix.data.store.pruning import own_block
from megatron_prefix.data.store.verify import (
    check_structure,
    refuse_foreign_tokens,
    verify_checksums,
)
from megatron_prefix.data.tree import PrefixTree
from megatron_prefix.text import counted


class PreferenceDataset(MappedFiles):
    """A data set that `build` wrote, memory-mapped: `dataset[i]` is group i as a PrefixTree.

    The columns of docs/data_format.md are attributes: `group_nodes` [G+1], `group_responses`
    [G+1], `group_pairs` [G+1], `group_records`, `group_num_records` [G], `node_parents` [M],
    `response_first`, `response_last`, `response_lengths`, `response_prompts`, `response_sets`,
    `response_ranks`, `response_scores` [R], `pair_responses` [P, 2], `pair_weights`,
    `pair_margins` [P], and the optional `response_roles` [R], `response_attributes` [R, A] and
    `pair_betas` [P], whose entries have one stated value if the data set lacks them. So are
    `node_lengths` [M] and `node_pointers` [M] (bytes) of the index, and `tokens` [T]. `images` are
    those of the prompts, an ImageStore; None if there are none.

    Opening checks the manifest, the size and shape of every file, and all columns: they make trees
    (`check_structure`). `check=False` leaves out the columns, for a process that opens a data set
    which another one of the same machine has checked. `PreferenceDataset.verified(prefix)` first
    compares all bytes with the checksums; `verify_dataset(dataset)` also counts everything again.
    A group that is read has only tokens of the vocabulary. All raise InputError.
    """

    def __init__(self, prefix: str | Path, *, check: bool = True) -> None:
        super().__init__(prefix)
        if check:
            check_structure(self)

    @classmethod
    def verified(cls, prefix: str | Path) -> PreferenceDataset:
        """The data set, after all its bytes were compared with the checksums. Raises InputError."""
        dataset = cls(prefix, check=False)
        verify_checksums(dataset)
        check_structure(dataset)
        return dataset

    @property
    def parts(self) -> tuple[PreferenceDataset, ...]:
        """The data sets that this one joins (joined.py), or it alone."""
        return (self,)

    @property
    def attribute_names(self) -> tuple[str, ...]:
        """Of the attributes of responses, as `build --attributes` was given them; else their
        numbers."""
        count = self.response_attributes.shape[1]
        names = self.parts[0].manifest["options"].get("attributes") or []
        return tuple(names) if len(names) == count else tuple(map(str, range(count)))

    def locate(self, group: int) -> tuple[PreferenceDataset, int]:
        """The part with group `group`, and the group's number in it."""
        return self, group

    def place(self, group: int) -> str:
        """A group in messages: "group 3 of PREFIX"."""
        part, local = self.locate(int(group))
        return f"group {local} of {part.prefix}"

    @property
    def pair_sides(self) -> np.ndarray:
        """(chosen, rejected) of every pair as indices among all responses, int64 [P, 2].

        Groups of 2 and 3 responses, with pairs [(0, 1)] and [(0, 2), (1, 2)] of their own, start at
        response 0 and 2: [(0, 1), (2, 4), (3, 4)].
        """
        firsts = np.asarray(self.group_responses[:-1], np.int64)
        first_of_pair = np.repeat(firsts, np.diff(self.group_pairs))
        return np.asarray(self.pair_responses, np.int64) + first_of_pair[:, None]

    @property
    def own_tokens(self) -> np.ndarray:
        """Tokens with loss of every response: its own, without its prompt, int64 [R]."""
        lengths = np.asarray(self.response_lengths, np.int64)
        return lengths - np.asarray(self.response_prompts, np.int64)

    @cached_property
    def desirable(self) -> np.ndarray:
        """Whether each response is good (1) or bad (0), float64 [R]; NaN without a label.

        By its pairs, in which it is chosen or rejected; without a pair by its score, if that is 1
        or 0. One that is both chosen and rejected has no label.
        """
        scores = np.asarray(self.response_scores)
        labels = np.where((scores == 0) | (scores == 1), scores, np.nan)
        is_chosen, is_rejected = np.zeros((2, len(labels)), bool)
        is_chosen[self.pair_sides[:, 0]], is_rejected[self.pair_sides[:, 1]] = True, True
        labels[is_chosen], labels[is_rejected] = 1.0, 0.0
        labels[is_chosen & is_rejected] = np.nan
        return labels

    def __getitem__(self, group: int) -> PrefixTree:
        group = self._checked(group)
        if self.source is not None:
            return self._restricted(self.source, group)
        m0, m1 = (int(x) for x in self.group_nodes[group : group + 2])
        r0, r1 = (int(x) for x in self.group_responses[group : group + 2])
        p0, p1 = (int(x) for x in self.group_pairs[group : group + 2])
        offsets = np.zeros(m1 - m0 + 1, np.int64)
        np.cumsum(self.node_lengths[m0:m1], out=offsets[1:])
        # Pointers count bytes: with 2 bytes per token, pointer 12 is token 6.
        start = int(self.node_pointers[m0]) // self.tokens.itemsize
        tokens = self.tokens[start : start + int(offsets[-1])]
        refuse_foreign_tokens(tokens, self)
        return PrefixTree(
            tokens=np.array(tokens, np.int64),
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
            images=None if self.images is None else self.images.in_tree(start, start + len(tokens)),
        )

    def _restricted(self, source: PreferenceDataset, group: int) -> PrefixTree:
        """The tree of a view: that of the data set `source` with some of its responses."""
        assert self.response_numbers is not None
        r0, r1 = (int(x) for x in self.group_responses[group : group + 2])
        own = self.response_numbers[r0:r1] - int(source.group_responses[group])
        tree = source[group].restrict(own.tolist())
        if self.pair_numbers is None:
            return tree
        p0, p1 = (int(x) for x in self.group_pairs[group : group + 2])
        return replace(
            tree,
            pairs=np.array(self.pair_responses[p0:p1]),
            pair_weights=np.array(self.pair_weights[p0:p1]),
            pair_margins=np.array(self.pair_margins[p0:p1]),
            pair_betas=np.array(self.pair_betas[p0:p1]),
        )

    def block(self, start: int, stop: int) -> Block:
        """Groups `start` to `stop` as columns; of a view, its own responses."""
        if self.source is not None:
            return own_block(self.source.block(start, stop))
        return super().block(start, stop)

    def group_num_tokens(self, group: int) -> int:
        """Tokens of a group as a tree."""
        group = self._checked(group)
        if self.source is not None:
            first, last = (int(x) for x in self.group_nodes[group : group + 2])
            return int(self.node_lengths[first:last].sum())
        m0, m1 = (int(x) for x in self.group_nodes[group : group + 2])
        end = int(self.node_pointers[m1]) if m1 < len(self.node_pointers) else self.tokens.nbytes
        return (end - int(self.node_pointers[m0])) // self.tokens.itemsize

    def groups_num_tokens(self) -> np.ndarray:
        """Tokens of every group as a tree, int64 [G]."""
        if self.source is not None:
            ends = np.cumsum(np.concatenate([[0], self.node_lengths]), dtype=np.int64)
            return np.diff(ends[self.group_nodes])
        # Pointers [0 6 10] of 18 bytes, 2 per token, group_nodes [0 2 3]: the groups begin at bytes
        # [0 10] and the last ends at 18, so they have 5 and 4 tokens.
        ends = np.append(self.node_pointers, self.tokens.nbytes)
        return np.diff(ends[self.group_nodes]) // self.tokens.itemsize

    @property
    def stored(self) -> PreferenceDataset:
        """The data set with all responses that its files have."""
        return self if self.source is None else self.source

    def stored_numbers(self, response_ids: np.ndarray) -> np.ndarray:
        """Responses (group, response in the group), [N, 2], as numbers among all that the files
        have, int64 [N].

        Groups of 2, 3 and 2 responses start at [0, 2, 5]: (1, 2) is number 4.
        """
        groups, responses = response_ids[:, 0], response_ids[:, 1]
        numbers = np.asarray(self.group_responses)[groups] + responses
        return numbers if self.response_numbers is None else self.response_numbers[numbers]

    source: PreferenceDataset | None = None
    """The data set with all responses, if some are left out; see roles/."""
    response_numbers: np.ndarray | None = None
    """The number of each response among all of `source`, [R]; None if none is left out."""
    comparisons: str = "all"
    """Which of the pairs are there; see steps/compositions/comparisons.py."""
    whole: PreferenceDataset | None = None
    """The data set with all pairs, if some are left out."""
    pair_numbers: np.ndarray | None = None
    """The number of each pair among all of the whole data set, [P]; None if none is left out."""

    def __reduce__(self) -> tuple[Callable[..., PreferenceDataset], tuple]:
        if self.source is not None:
            raise TypeError(f"{self.prefix} with some of its responses cannot be pickled")
        if self.comparisons != "all":
            raise TypeError(f"{self.prefix} with {self.comparisons} of its pairs cannot be pickled")
        return partial(PreferenceDataset, check=False), (self.prefix,)

    def _checked(self, group: int) -> int:
        if not 0 <= group < len(self):
            raise IndexError(f"group {group} of a data set of {counted(len(self), 'group')}")
        return int(group)
