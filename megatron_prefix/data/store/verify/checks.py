"""Checks of a data set: its bytes are those that were written, and they make trees.

Everything is read in spans and checked by whole columns. So a check takes as long as reading, and
holds one span in memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megatron_prefix.data.files import is_partition, manifest_digest, sha256
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.data.store.manifest import fingerprint
from megatron_prefix.data.store.statistics import Statistics
from megatron_prefix.data.store.verify.problems import column_problems, token_problems
from megatron_prefix.data.store.verify.spans import Span, spans
from megatron_prefix.errors import InputError

REMEDY = "build the data set again"
CHUNK = 1 << 20


def verify_dataset(dataset: PreferenceDataset) -> None:
    """Check the checksums and every invariant of the layout. Raises InputError."""
    _verify_files(dataset)
    _verify_layout(dataset)
    _verify_manifest(dataset)


def verify_checksums(dataset: PreferenceDataset) -> None:
    """Compare all files and the manifest with their checksums. Raises InputError."""
    _verify_files(dataset)
    _verify_manifest(dataset)


def _verify_manifest(dataset: PreferenceDataset) -> None:
    if manifest_digest(dataset.manifest) != dataset.manifest.get("sha256"):
        raise InputError(
            f"{dataset.prefix}.json is damaged or was changed: its SHA-256 differs: {REMEDY}"
        )


def _verify_files(dataset: PreferenceDataset) -> None:
    """Compare every file with the manifest; the error names the first that differs."""
    manifest = dataset.manifest
    for name, path in dataset.files.items():
        expected = manifest["files"][name]["sha256"]
        if (digest := sha256(path)) != expected:
            raise InputError(
                f"{path} is damaged: its SHA-256 begins with {digest[:12]}, in the manifest it "
                f"begins with {expected[:12]}: {REMEDY}"
            )
    if fingerprint(manifest["files"], manifest["tokenizer"]) != manifest["fingerprint"]:
        raise InputError(f"{dataset.prefix}.json is damaged: its fingerprint is wrong: {REMEDY}")


def _verify_layout(dataset: PreferenceDataset) -> None:
    """Check everything that the format promises; the error names the file or the group."""
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
        for group, problem in token_problems(span):
            raise InputError(f"{prefix}: group {span.start + group}: {problem}: {REMEDY}")
        totals.add(span.block)
    counted = {"counts": totals.counts, "tokens": totals.tokens, "lengths": totals.lengths()}
    for name, value in counted.items():
        if dataset.manifest.get(name) != value:
            raise InputError(f"{prefix}.json: {name} are not those of the files: {REMEDY}")


def sound_spans(dataset: PreferenceDataset) -> Iterator[Span]:
    """All groups in spans whose columns make trees; the error names a group whose columns do not.

    Neither checksums nor tokens are read. It is enough to rely on parents, responses and pairs.
    """
    verify_offsets(dataset)
    for span in spans(dataset):
        _refuse(span, dataset)
        yield span


def verify_group(dataset: PreferenceDataset, group: int) -> None:
    """Check the columns of one group, after `verify_offsets`. Raises InputError."""
    _refuse(Span(group, group + 1, dataset.block(group, group + 1)), dataset)


def _refuse(span: Span, dataset: PreferenceDataset) -> None:
    for group, problem in column_problems(span):
        raise InputError(f"{dataset.prefix}: group {span.start + group}: {problem}: {REMEDY}")


def verify_offsets(dataset: PreferenceDataset) -> None:
    """Check that groups divide nodes, responses and pairs without a gap. Raises InputError."""
    counts = dataset.manifest["counts"]
    for name in ("nodes", "responses", "pairs"):
        least = 0 if name == "pairs" and not counts["pairs"] else 1
        if not is_partition(getattr(dataset, f"group_{name}"), counts[name], least):
            raise InputError(
                f"{dataset.prefix}.tree/group_{name}.npy: offsets do not ascend: {REMEDY}"
            )


def _verify_groups(dataset: PreferenceDataset) -> None:
    prefix, records = dataset.prefix, dataset.group_records
    for start in range(0, len(dataset.documents), CHUNK):
        part = slice(start, start + CHUNK)
        if not np.array_equal(dataset.documents[part], dataset.group_nodes[part]):
            raise InputError(f"{prefix}.idx: documents are not the groups: {REMEDY}")
    for start in range(0, len(dataset), CHUNK):
        with_next = records[start : start + CHUNK + 1]
        if records[0] < 0 or (np.diff(with_next) <= 0).any():
            raise InputError(f"{prefix}.tree/group_records.npy: records do not ascend: {REMEDY}")
        if (dataset.group_num_records[start : start + CHUNK] < 1).any():
            raise InputError(
                f"{prefix}.tree/group_num_records.npy: a group has no record: {REMEDY}"
            )


def _verify_index(dataset: PreferenceDataset) -> None:
    """Check that nodes fill .bin without a gap.

    Lengths [3, 2, 4] of tokens of 2 bytes have the pointers [0, 6, 10], and end at token 9.
    """
    prefix, at = dataset.prefix, 0
    for start in range(0, len(dataset.node_lengths), CHUNK):
        lengths = dataset.node_lengths[start : start + CHUNK].astype(np.int64)
        # `at` carries the sum over chunks, so that no more than one chunk is in memory.
        ends = at + np.cumsum(lengths)
        if (lengths < 1).any():
            raise InputError(f"{prefix}.idx: node lengths do not add up to the tokens: {REMEDY}")
        pointers = (ends - lengths) * dataset.tokens.itemsize
        if not np.array_equal(pointers, dataset.node_pointers[start : start + CHUNK]):
            raise InputError(f"{prefix}.idx: pointers do not follow the lengths: {REMEDY}")
        at = int(ends[-1])
    if at != dataset.manifest["counts"]["tokens"]:
        raise InputError(f"{prefix}.idx: node lengths do not add up to the tokens: {REMEDY}")
