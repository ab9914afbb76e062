"""Checks of a data set: its bytes are those that were written, and they make trees.

    check_structure     all columns, when a data set is opened: neither checksums nor tokens
    verify_checksums    all bytes, and that every token is one of the vocabulary
    verify_dataset      both, and the counts in the manifest

Everything is read in spans and checked by whole columns. So a check takes about as long as reading,
and holds one span in memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megatron_prefix.data.files import is_partition, sha256
from megatron_prefix.data.store.mapped import MappedFiles
from megatron_prefix.data.store.statistics import Statistics
from megatron_prefix.data.store.verify.images import check_images, verify_images
from megatron_prefix.data.store.verify.problems import column_problems, token_problems
from megatron_prefix.data.store.verify.spans import Span, all_spans
from megatron_prefix.errors import InputError

REMEDY = "build the data set again"
CHUNK = 1 << 20


def verify_dataset(dataset: MappedFiles) -> None:
    """Check the checksums and every invariant of the layout. Raises InputError."""
    verify_checksums(dataset)
    _verify_layout(dataset)


def check_structure(dataset: MappedFiles) -> None:
    """Check that the columns and the index make trees. Raises InputError with the file or the
    group.

    Neither checksums nor tokens are read. 10 million pairs take about 1.5 s if the columns are in
    memory (docs/robustness.md).
    """
    _verify_groups(dataset)
    _verify_index(dataset)
    check_images(dataset)
    for _ in _sound_spans(dataset):
        pass


def verify_checksums(dataset: MappedFiles) -> None:
    """Compare all files with their checksums, and all tokens with the vocabulary. Raises
    InputError with the first file that differs."""
    for name, path in dataset.files.items():
        expected = dataset.manifest["files"][name]["sha256"]
        if (digest := sha256(path)) != expected:
            raise InputError(
                f"{path} is damaged: its SHA-256 begins with {digest[:12]}, in the manifest it "
                f"begins with {expected[:12]}: {REMEDY}"
            )
    verify_tokens(dataset)


def verify_tokens(dataset: MappedFiles) -> None:
    """Read all tokens and check that they are of the vocabulary. Raises InputError."""
    for start in range(0, len(dataset.tokens), CHUNK):
        refuse_foreign_tokens(dataset.tokens[start : start + CHUNK], dataset)


def refuse_foreign_tokens(tokens: np.ndarray, dataset: MappedFiles) -> None:
    """Raise InputError if one of `tokens` is outside the data set's vocabulary."""
    if tokens.min() < 0 or tokens.max() >= dataset.vocab_size:
        raise InputError(
            f"{dataset.prefix}.bin: a token id is outside the vocabulary of {dataset.vocab_size}: "
            f"{REMEDY}"
        )


def _verify_layout(dataset: MappedFiles) -> None:
    """Check everything that the format promises; the error names the file or the group."""
    prefix = dataset.prefix
    _verify_groups(dataset)
    _verify_index(dataset)
    check_images(dataset)
    verify_images(dataset)
    totals = Statistics()
    for span in _sound_spans(dataset):
        for group, problem in token_problems(span):
            raise InputError(f"{prefix}: group {span.start + group}: {problem}: {REMEDY}")
        totals.add(span.block)
    counted = {"counts": totals.counts, "tokens": totals.tokens, "lengths": totals.lengths()}
    for name, value in counted.items():
        if dataset.manifest.get(name) != value:
            raise InputError(f"{prefix}.json: {name} are not those of the files: {REMEDY}")


def _sound_spans(dataset: MappedFiles) -> Iterator[Span]:
    """All groups in spans whose columns make trees; the error names a group whose columns do not.

    The offsets of groups must be sound.
    """
    for span in all_spans(dataset):
        for group, problem in column_problems(span):
            raise InputError(f"{dataset.prefix}: group {span.start + group}: {problem}: {REMEDY}")
        yield span


def _verify_groups(dataset: MappedFiles) -> None:
    """Check that groups divide nodes, responses and pairs without a gap, and their records."""
    prefix, counts, records = dataset.prefix, dataset.manifest["counts"], dataset.group_records
    for name in ("nodes", "responses", "pairs"):
        least = 0 if name == "pairs" and not counts["pairs"] else 1
        if not is_partition(getattr(dataset, f"group_{name}"), counts[name], least):
            raise InputError(f"{prefix}.tree/group_{name}.npy: offsets do not ascend: {REMEDY}")
    for start in range(0, len(dataset.documents), CHUNK):
        part = slice(start, start + CHUNK)
        if not np.array_equal(dataset.documents[part], dataset.group_nodes[part]):
            raise InputError(f"{prefix}.idx: documents are not the groups: {REMEDY}")
    for start in range(0, len(dataset), CHUNK):
        with_next = records[start : start + CHUNK + 1]
        if records[0] < 0 or (with_next[1:] <= with_next[:-1]).any():
            raise InputError(f"{prefix}.tree/group_records.npy: records do not ascend: {REMEDY}")


def _verify_index(dataset: MappedFiles) -> None:
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
