"""Checks of a data set: that its bytes are those that were written, and that they make trees."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from megatron_prefix.data.columns import sha256
from megatron_prefix.data.manifest import FILES, fingerprint, manifest_digest, suffix_path
from megatron_prefix.data.statistics import path_lengths
from megatron_prefix.data.tree import PrefixTree
from megatron_prefix.errors import InputError

if TYPE_CHECKING:
    from megatron_prefix.data.store import PreferenceDataset

REMEDY = "build the data set again"
CHUNK = 1 << 20


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
    counts, prefix = dataset.manifest["counts"], dataset.prefix
    for name, total in (("nodes", "nodes"), ("responses", "responses"), ("pairs", "pairs")):
        offsets = np.asarray(getattr(dataset, f"group_{name}"))
        least = 0 if name == "pairs" and not counts["pairs"] else 1
        if offsets[0] != 0 or offsets[-1] != counts[total] or (np.diff(offsets) < least).any():
            raise InputError(f"{prefix}.tree/group_{name}.npy: offsets do not ascend: {REMEDY}")
    if not np.array_equal(dataset.documents, dataset.group_nodes):
        raise InputError(f"{prefix}.idx: documents are not the groups: {REMEDY}")
    if (np.diff(dataset.group_records) <= 0).any() or dataset.group_records[0] < 0:
        raise InputError(f"{prefix}.tree/group_records.npy: records do not ascend: {REMEDY}")
    if (dataset.group_num_records < 1).any():
        raise InputError(f"{prefix}.tree/group_num_records.npy: a group of no record: {REMEDY}")
    lengths = np.asarray(dataset.node_lengths, np.int64)
    ends = np.cumsum(lengths)
    pointers = (ends - lengths) * dataset.tokens.itemsize
    if (lengths < 1).any() or ends[-1] != counts["tokens"]:
        raise InputError(f"{prefix}.idx: node lengths do not add up to the tokens: {REMEDY}")
    if not np.array_equal(pointers, dataset.node_pointers):
        raise InputError(f"{prefix}.idx: pointers do not follow the lengths: {REMEDY}")
    for start in range(0, len(dataset.tokens), CHUNK):
        chunk = dataset.tokens[start : start + CHUNK]
        if chunk.min() < 0 or chunk.max() >= dataset.vocab_size:
            raise InputError(f"{prefix}.bin: a token id is outside the vocabulary: {REMEDY}")
    for group in range(len(dataset)):
        problem = _tree_problem(dataset, group)
        if problem:
            raise InputError(f"{prefix}: group {group}: {problem}: {REMEDY}")


def _tree_problem(dataset: PreferenceDataset, group: int) -> str | None:
    tree = dataset[group]
    nodes, responses = tree.num_nodes, tree.num_responses
    for name, values, count in (
        ("response_first", tree.response_first, nodes),
        ("response_last", tree.response_last, nodes),
        ("pair_responses", tree.pairs, responses),
    ):
        if values.min(initial=0) < 0 or values.max(initial=-1) >= count:
            return f"{name} points outside the group"
    problem = _shape_problem(tree)
    if problem:
        return problem
    for response in range(responses):
        if tree.response_first[response] not in tree.path(int(tree.response_last[response])):
            return f"response {response} begins off its own path"
    lengths, prompts = path_lengths(tree)
    r0 = int(dataset.group_responses[group])
    if not np.array_equal(dataset.response_lengths[r0 : r0 + responses], lengths):
        return "response_lengths differ from the paths"
    if not np.array_equal(dataset.response_prompts[r0 : r0 + responses], prompts):
        return "response_prompts differ from the paths"
    if prompts.min() < 1:
        return "a response has no prompt token"
    return _pair_problem(tree)


def _shape_problem(tree: PrefixTree) -> str | None:
    """Parents before children, children right behind, every token once."""
    above: list[int] = []
    starts: set[tuple[int, int]] = set()
    first_tokens = tree.tokens[tree.node_offsets[:-1]].tolist()
    for node, parent in enumerate(tree.parents.tolist()):
        while above and above[-1] != parent:
            above.pop()
        if parent >= 0 and not above:
            return f"node {node} does not stand behind its parent {parent}"
        if parent < -1:
            return f"node {node} has parent {parent}"
        if (parent, first_tokens[node]) in starts:
            return f"two children of node {parent} begin with the same token"
        starts.add((parent, first_tokens[node]))
        above.append(node)
    return None


def _pair_problem(tree: PrefixTree) -> str | None:
    chosen, rejected = tree.pairs.T
    if (chosen == rejected).any():
        return "a pair compares a response with itself"
    if (tree.response_sets[chosen] != tree.response_sets[rejected]).any():
        return "a pair reaches over two comparison sets"
    if not (np.isfinite(tree.pair_weights).all() and (tree.pair_weights > 0).all()):
        return "a pair's weight is not a number above 0"
    if np.isinf(tree.pair_margins).any() or np.isinf(tree.scores).any():
        return "a margin or a score is infinite"
    if tree.ranks.min() < -1 or tree.response_sets.min() < 0:
        return "a rank or a set is negative"
    return None
