"""Checks of a data set: that its bytes are those that were written, and that they make trees.

Everything is read in spans and checked by whole columns, so that time is that of reading and
memory that of a span.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megatron_prefix.data.store.columns import sha256
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.data.store.manifest import FILES, fingerprint, manifest_digest, suffix_path
from megatron_prefix.data.store.spans import Span, spans
from megatron_prefix.data.store.statistics import Statistics
from megatron_prefix.errors import InputError

REMEDY = "build the data set again"
CHUNK = 1 << 20


def verify_dataset(dataset: PreferenceDataset) -> None:
    """Check the checksums and every invariant of the layout. Raises InputError."""
    verify_files(dataset)
    verify_layout(dataset)
    verify_manifest(dataset)


def verify_checksums(dataset: PreferenceDataset) -> None:
    """Compare all that was written with its checksums; InputError names what differs."""
    verify_files(dataset)
    verify_manifest(dataset)


def verify_manifest(dataset: PreferenceDataset) -> None:
    """Compare the manifest with its own checksum."""
    if manifest_digest(dataset.manifest) != dataset.manifest.get("sha256"):
        raise InputError(
            f"{dataset.prefix}.json is damaged, or was changed: its SHA-256 is another: {REMEDY}"
        )


def verify_files(dataset: PreferenceDataset) -> None:
    """Compare every file with the manifest; InputError names the first that differs."""
    manifest = dataset.manifest
    for name in FILES:
        path = suffix_path(dataset.prefix, name)
        if (found := sha256(path)) != manifest["files"][name]["sha256"]:
            raise InputError(
                f"{path} is damaged: its SHA-256 begins with {found[:12]}, the manifest says "
                f"{manifest['files'][name]['sha256'][:12]}: {REMEDY}"
            )
    if fingerprint(manifest["files"], manifest["tokenizer"]) != manifest["fingerprint"]:
        raise InputError(f"{dataset.prefix}.json is damaged: its fingerprint is wrong: {REMEDY}")


def verify_layout(dataset: PreferenceDataset) -> None:
    """Check all that the format promises; InputError names the file or the group."""
    prefix = dataset.prefix
    verify_offsets(dataset)
    _verify_groups(dataset)
    _verify_index(dataset)
    for start in range(0, len(dataset.tokens), CHUNK):
        chunk = dataset.tokens[start : start + CHUNK]
        if chunk.min() < 0 or chunk.max() >= dataset.vocab_size:
            raise InputError(f"{prefix}.bin: a token id is outside the vocabulary: {REMEDY}")
    totals = Statistics()
    for span in sound_spans(dataset):
        for group, problem in _token_problems(span):
            raise InputError(f"{prefix}: group {span.start + group}: {problem}: {REMEDY}")
        totals.add(span.block)
    found = {"counts": totals.counts, "tokens": totals.tokens, "lengths": totals.lengths()}
    for name, value in found.items():
        if dataset.manifest.get(name) != value:
            raise InputError(f"{prefix}.json: {name} are not those of the files: {REMEDY}")


def sound_spans(dataset: PreferenceDataset) -> Iterator[Span]:
    """All groups in spans whose columns make trees; InputError names the group that does not.

    Neither checksums nor tokens are read: enough to rely on parents, responses and pairs.
    """
    verify_offsets(dataset)
    for span in spans(dataset):
        _refuse(span, dataset)
        yield span


def verify_group(dataset: PreferenceDataset, group: int) -> None:
    """Check the columns of one group, of a data set whose offsets are sound. Raises InputError."""
    _refuse(Span(group, group + 1, dataset.block(group, group + 1)), dataset)


def _refuse(span: Span, dataset: PreferenceDataset) -> None:
    for group, problem in _column_problems(span):
        group += span.start
        raise InputError(f"{dataset.prefix}: group {group}: {problem}: {REMEDY}")


def verify_offsets(dataset: PreferenceDataset) -> None:
    """Check that groups cut nodes, responses and pairs without a gap. Raises InputError."""
    counts = dataset.manifest["counts"]
    for name in ("nodes", "responses", "pairs"):
        least = 0 if name == "pairs" and not counts["pairs"] else 1
        if not is_partition(getattr(dataset, f"group_{name}"), counts[name], least):
            raise InputError(
                f"{dataset.prefix}.tree/group_{name}.npy: offsets do not ascend: {REMEDY}"
            )


def is_partition(offsets: np.ndarray, total: int, least: int) -> bool:
    """Whether offsets run from 0 to `total` in steps of at least `least`, read in chunks."""
    if offsets[0] != 0 or offsets[-1] != total:
        return False
    return not any((np.diff(chunk) < least).any() for _, chunk in _overlapping(offsets))


def _overlapping(column: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Chunks that share one entry with the next, with where they begin."""
    for start in range(0, len(column) - 1, CHUNK):
        yield start, np.asarray(column[start : start + CHUNK + 1])


def _verify_groups(dataset: PreferenceDataset) -> None:
    prefix, records = dataset.prefix, dataset.group_records
    for start, chunk in _overlapping(dataset.group_nodes):
        if not np.array_equal(dataset.documents[start : start + len(chunk)], chunk):
            raise InputError(f"{prefix}.idx: documents are not the groups: {REMEDY}")
    ascend = all((np.diff(chunk) > 0).all() for _, chunk in _overlapping(records))
    if records[0] < 0 or not ascend:
        raise InputError(f"{prefix}.tree/group_records.npy: records do not ascend: {REMEDY}")
    for start in range(0, len(dataset), CHUNK):
        if (dataset.group_num_records[start : start + CHUNK] < 1).any():
            raise InputError(f"{prefix}.tree/group_num_records.npy: a group of no record: {REMEDY}")


def _verify_index(dataset: PreferenceDataset) -> None:
    """Lengths add up to the tokens, pointers follow them: nodes fill .bin without a gap."""
    prefix, at = dataset.prefix, 0
    for start in range(0, len(dataset.node_lengths), CHUNK):
        lengths = dataset.node_lengths[start : start + CHUNK].astype(np.int64)
        ends = at + np.cumsum(lengths)
        if (lengths < 1).any():
            raise InputError(f"{prefix}.idx: node lengths do not add up to the tokens: {REMEDY}")
        pointers = (ends - lengths) * dataset.tokens.itemsize
        if not np.array_equal(pointers, dataset.node_pointers[start : start + CHUNK]):
            raise InputError(f"{prefix}.idx: pointers do not follow the lengths: {REMEDY}")
        at = int(ends[-1])
    if at != dataset.manifest["counts"]["tokens"]:
        raise InputError(f"{prefix}.idx: node lengths do not add up to the tokens: {REMEDY}")


Problem = tuple[int, str]


def _column_problems(span: Span) -> Iterator[Problem]:
    """(group of the span, what is wrong with it); each check may rely on those before it."""
    yield from _pointing_problems(span)
    yield from _shape_problems(span)
    yield from _response_problems(span)
    yield from _pair_problems(span)


def _first(bad: np.ndarray, groups: np.ndarray, text: str) -> Iterator[Problem]:
    """The first entry that is `bad`, and its group; {n} is its number within the group."""
    for at in np.flatnonzero(bad)[:1]:
        group = groups[at]
        yield int(group), text.format(n=at - np.searchsorted(groups, group))


def _pointing_problems(span: Span) -> Iterator[Problem]:
    for name, group, limit in (
        ("response_first", span.group_of_response, "group_nodes"),
        ("response_last", span.group_of_response, "group_nodes"),
        ("pair_responses", span.group_of_pair, "group_responses"),
    ):
        values = span[name].reshape(len(group), 2 if name == "pair_responses" else 1)
        bad = (values < 0) | (values >= span[limit][group][:, None])
        yield from _first(bad.any(axis=1), group, f"{name} points outside the group")


def _shape_problems(span: Span) -> Iterator[Problem]:
    """Parents before children, children right behind.

    Nodes stand in pre-order where depth grows by at most one from each to the next, and each
    one's parent is the last node before it that is one less deep: depths [1 2 3 3 2] have the
    parents [-1 0 1 1 0].
    """
    group, parents = span.group_of_node, span.parents
    index, local = np.arange(len(group)), span["node_parents"]
    yield from _first(local < -1, group, "node {n} has a parent below -1")
    late = "node {n} does not stand behind its parent"
    yield from _first(parents >= index, group, late)
    depths = span.depths
    base = len(index) + 1
    keys = np.sort(depths * base + index)
    found = np.searchsorted(keys, (depths - 1) * base + index) - 1
    nearest = np.where(depths > 1, keys[found] - (depths - 1) * base, -1)
    leaps = np.diff(depths, prepend=0) > 1
    yield from _first((nearest != parents) | leaps, group, late)


def _token_problems(span: Span) -> Iterator[Problem]:
    """Every token once: two children of one parent, or two roots, begin with different ones."""
    group, parents, local = span.group_of_node, span.parents, span["node_parents"]
    first_token = span.block.tokens[span.lengths.cumsum() - span.lengths].astype(np.int64)
    above = np.where(parents < 0, len(parents) + group, parents)
    order = np.lexsort((first_token, above))
    twice = (np.diff(above[order]) == 0) & (np.diff(first_token[order]) == 0)
    for at in np.flatnonzero(twice)[:1]:
        parent = int(local[order[at]])
        text = f"two children of node {parent} begin with the same token"
        yield int(group[order[at]]), text


def _response_problems(span: Span) -> Iterator[Problem]:
    group, lengths = span.group_of_response, span.lengths
    first, last = span.own_nodes("first"), span.own_nodes("last")
    node = last.copy()
    while (climbing := node > first).any():
        node[climbing] = span.parents[node[climbing]]
    yield from _first(node != first, group, "response {n} begins off its own path")
    prompts = span.ends[first] - lengths[first]
    for name, values in (("lengths", span.ends[last]), ("prompts", prompts)):
        bad = span[f"response_{name}"] != values
        yield from _first(bad, group, f"response_{name} differ from the paths at {{n}}")
    yield from _first(prompts < 1, group, "response {n} has no prompt token")
    bad = (span["response_ranks"] < -1) | (span["response_sets"] < 0)
    yield from _first(bad, group, "a rank or a set of response {n} is negative")
    yield from _first(
        np.isinf(span["response_scores"]), group, "the score of response {n} is infinite"
    )


def _pair_problems(span: Span) -> Iterator[Problem]:
    group = span.group_of_pair
    first = (np.cumsum(span["group_responses"]) - span["group_responses"])[group]
    chosen, rejected = span["pair_responses"].T + first
    yield from _first(chosen == rejected, group, "pair {n} compares a response with itself")
    sets, weights = span["response_sets"], span["pair_weights"]
    apart = sets[chosen] != sets[rejected]
    yield from _first(apart, group, "pair {n} reaches over two comparison sets")
    bad = ~(np.isfinite(weights) & (weights > 0))
    yield from _first(bad, group, "the weight of pair {n} is not a number above 0")
    yield from _first(np.isinf(span["pair_margins"]), group, "the margin of pair {n} is infinite")
