"""A step as one table: the responses and pairs of all ranks' rows, from the plan alone.

Objectives that look at the whole step read this table. Its entries are the responses as they run,
in the order of the step's bundles (slot, then item), so neither rows nor ranks change it. A group
that is in the step twice has two slots and so its entries twice. Shapes: E entries, P pairs, S
comparison sets, K entries of the largest set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby

import numpy as np

from megatron_prefix.data.steps.collate import padded_members, set_members
from megatron_prefix.data.steps.denominators import loss_weights
from megatron_prefix.data.steps.sharing import Bundle, bundle_parts
from megatron_prefix.data.store import PreferenceDataset


@dataclass(frozen=True, kw_only=True, eq=False)
class StepColumns:
    """The columns of a table; `pairs` and `members` index its entries.

    response_ids int64 [E, 2] are (group, response in the group); num_tokens int64 [E] counts own
    tokens; ranks int64 [E], labels and desirable float64 [E], pairs int64 [P, 2], pair_weights
    float64 [P], margins and betas float64 [P] and members int64 [S, K] are as in MicroBatch.
    set_weights float64 [S] is 1 for a set with a pair, else 0. `places` has, for each bundle or
    part of one, its entries and its pairs, in the order in which they are in its row.
    """

    response_ids: np.ndarray
    num_tokens: np.ndarray
    ranks: np.ndarray
    labels: np.ndarray
    desirable: np.ndarray
    pairs: np.ndarray
    pair_weights: np.ndarray
    margins: np.ndarray
    betas: np.ndarray
    members: np.ndarray
    set_weights: np.ndarray
    places: Mapping[Bundle, tuple[np.ndarray, np.ndarray]]

    @classmethod
    def of_dataset(cls, dataset: PreferenceDataset, weighting: str) -> StepColumns:
        """A whole data set as one step: each response once, in its order. There are no places."""
        firsts = np.asarray(dataset.group_responses)
        group = np.repeat(np.arange(len(dataset)), np.diff(firsts))
        pairs, members = dataset.pair_sides, dataset_members(dataset)
        weights = [loss_weights(dataset, g, weighting) for g in range(len(dataset))]
        return cls(
            response_ids=np.stack([group, np.arange(len(group)) - firsts[group]], axis=1),
            num_tokens=dataset.own_tokens,
            ranks=np.array(dataset.response_ranks, np.int64),
            labels=np.array(dataset.response_scores),
            desirable=dataset.desirable,
            pairs=pairs,
            pair_weights=np.concatenate(weights),
            margins=np.array(dataset.pair_margins),
            betas=np.array(dataset.pair_betas),
            members=members,
            set_weights=_set_weights(members, pairs, len(group)),
            places={},
        )

    @property
    def num_entries(self) -> int:
        return len(self.response_ids)

    def arrays(self) -> dict[str, np.ndarray]:
        """What objectives read, by name."""
        return {x.name: getattr(self, x.name) for x in fields(self)[1:-1]}

    def row_places(self, row: Sequence[Bundle]) -> tuple[np.ndarray, np.ndarray]:
        """The entries of a row's responses [R], and the table's pairs that are its pairs [P]."""
        parts = [self.places[bundle] for bundle in row]
        entries = _joined([entries for entries, _ in parts], np.int64)
        return entries, _joined([pairs for _, pairs in parts], np.int64)


def step_columns(
    dataset: PreferenceDataset, bundles: Sequence[Bundle], sharing: str, weighting: str
) -> StepColumns:
    """The table of a step's bundles, in their order, by slot and item. The parts of a bundle make
    the entries and pairs that the bundle would make whole; a pair may have its sides in two parts.

    Two bundles of the group 7, with responses [0 1] and [0 2] (sharing `none`), have the entries
    [0 1] and [2 3]: response 0 runs twice, and each run has an entry of its own.
    """
    places: dict[Bundle, tuple[np.ndarray, np.ndarray]] = {}
    ids, pairs, weights = [np.zeros((0, 2), np.int64)], [np.zeros((0, 2), np.int64)], []
    responses, pair_numbers, sets = [], [], []
    first = first_pair = 0
    for _, parts in groupby(bundles, key=lambda bundle: (bundle.slot, bundle.item)):
        parts_of_bundle = list(parts)
        bundle = replace(parts_of_bundle[0], part=None)
        own, own_pairs = bundle_parts(dataset, bundle, sharing)
        r0, p0 = int(dataset.group_responses[bundle.group]), int(dataset.group_pairs[bundle.group])
        # Responses [0 2] from entry 6 on: local [6 -1 7], so the pair (2, 0) becomes (7, 6).
        local = np.full(int(own.max(initial=-1)) + 1, -1)
        local[own] = np.arange(first, first + len(own))
        sides = np.asarray(dataset.pair_responses[p0 + own_pairs], np.int64)
        pairs.append(local[sides].reshape(-1, 2))
        weights.append(loss_weights(dataset, bundle.group, weighting)[own_pairs])
        sets += set_members(np.asarray(dataset.response_sets[r0 + own]), first)
        ids.append(np.stack([np.full(len(own), bundle.group), own], axis=1))
        responses.append(r0 + own)
        pair_numbers.append(p0 + own_pairs)
        for part in parts_of_bundle:
            # Pairs [3 5 8] of the bundle from pair 20 of the table on: a part's pair 5 is pair 21.
            part_responses, part_pairs = bundle_parts(dataset, part, sharing)
            numbers = first_pair + np.searchsorted(own_pairs, part_pairs)
            places[part] = local[part_responses], numbers
        first, first_pair = first + len(own), first_pair + len(own_pairs)
    response, numbers_of_pairs = _joined(responses, np.int64), _joined(pair_numbers, np.int64)
    lengths = np.asarray(dataset.response_lengths[response], np.int64)
    members = padded_members(sets)
    return StepColumns(
        response_ids=np.concatenate(ids),
        num_tokens=lengths - np.asarray(dataset.response_prompts[response], np.int64),
        ranks=np.asarray(dataset.response_ranks[response], np.int64),
        labels=np.asarray(dataset.response_scores[response], np.float64),
        desirable=dataset.desirable[response],
        pairs=np.concatenate(pairs),
        pair_weights=_joined(weights, np.float64),
        margins=np.asarray(dataset.pair_margins[numbers_of_pairs], np.float64),
        betas=np.asarray(dataset.pair_betas[numbers_of_pairs], np.float64),
        members=members,
        set_weights=_set_weights(members, np.concatenate(pairs), first),
        places=places,
    )


def dataset_members(dataset: PreferenceDataset) -> np.ndarray:
    """The responses of every comparison set among all of the data set, [S, K] filled up with -1.

    Groups of sets [0, 0, 1] and [0, 0]: [[0, 1], [2, -1], [3, 4]].
    """
    firsts = np.asarray(dataset.group_responses)
    group = np.repeat(np.arange(len(dataset)), np.diff(firsts))
    sets = np.asarray(dataset.response_sets, np.int64)
    keys = group * (int(sets.max(initial=0)) + 1) + sets
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.diff(keys[order], prepend=-1))
    sizes = np.diff(np.append(starts, len(keys)))
    members = np.full((len(starts), int(sizes.max(initial=1))), -1, np.int64)
    row = np.repeat(np.arange(len(starts)), sizes)
    members[row, np.arange(len(keys)) - np.repeat(starts, sizes)] = order
    return members


def _set_weights(members: np.ndarray, pairs: np.ndarray, num_entries: int) -> np.ndarray:
    """1 for a set with a pair, else 0, float64 [S]."""
    has_pair = np.zeros(num_entries + 1)  # the last entry is that of the members that fill up
    has_pair[pairs.ravel()] = 1.0
    return has_pair[members].max(axis=1)


def _joined(arrays: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *arrays]).astype(dtype)
