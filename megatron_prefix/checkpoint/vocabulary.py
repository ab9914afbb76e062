"""The tokens that a model knows, against those that the data sets were built with.

Ids mean nothing without a vocabulary: a model that reads the ids of another tokenizer learns
noise. The manifest of a data set (from version 3 on) has the SHA-256 of its tokenizer's pieces,
ids and special tokens. The chat template is no part of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.data.tokenize import load_tokenizer
from megatron_prefix.errors import InputError

VOCABULARY_FILES = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "tekken.json")
"""Files of which a directory with a tokenizer has at least one."""


def compare_vocabularies(directory: Path, datasets: Sequence[PreferenceDataset]) -> str | None:
    """Compare the tokenizer in a model's directory with that of each data set.

    Returns a line for the user if they could not be compared. Raises InputError if they differ, or
    if the directory's tokenizer cannot be loaded.
    """
    if not any(any(directory.glob(pattern)) for pattern in VOCABULARY_FILES):
        return (
            f"the model in {directory} has no tokenizer, so it could not be compared with that of "
            "the data: only the sizes of the vocabularies were"
        )
    built: list[dict[str, Any]] = [dataset.manifest["tokenizer"] for dataset in datasets]
    if all("vocabulary" not in entry for entry in built):
        return (
            f"the tokenizer of the model in {directory} could not be compared with that of the "
            "data, which does not record its vocabulary (a data set of version 2): only the sizes "
            "of the vocabularies were"
        )
    own = set(_vocabularies(directory))
    for dataset, entry in zip(datasets, built, strict=True):
        if "vocabulary" in entry and entry["vocabulary"] not in own:
            raise InputError(
                f"data set {dataset.prefix} was built with tokenizer {entry['name']} "
                f"({entry['vocab_size']} entries), and the model in {directory} has another "
                f"vocabulary: build the data set with --tokenizer {directory}, or set "
                "model.allow_other_tokenizer: true if its ids are those that the model knows"
            )
    return None


def _vocabularies(directory: Path) -> Iterator[str]:
    """The vocabulary of the directory's tokenizer, and of each SentencePiece model in it, with
    which a data set may have been built."""
    for spec in (directory, *sorted(directory.glob("*.model"))):
        try:
            yield load_tokenizer(str(spec)).describe()["vocabulary"]
        except Exception as error:  # each library below has its own kinds for a damaged file
            if spec == directory:
                raise InputError(
                    f"the tokenizer of the model in {directory} cannot be loaded "
                    f"({' '.join(str(error).split())[:300]}): fetch the model again, or set "
                    "model.allow_other_tokenizer: true to train without a comparison"
                ) from None
