"""A data set of the library `datasets`, already in memory, -> a data set on disk."""

from __future__ import annotations

import tempfile
import weakref
from pathlib import Path
from typing import Any

from megatron_prefix.data.build.builder import build_dataset
from megatron_prefix.data.build.options import BuildOptions
from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.data.tokenize import Tokenizer, load_tokenizer
from megatron_prefix.errors import InputError


def from_hf_dataset(
    dataset: Any,
    tokenizer: Any,
    output: str | Path | None = None,
    options: BuildOptions | None = None,
) -> PreferenceDataset:
    """The trees of a `datasets.Dataset`, as `megatron-prefix build` makes them of the same rows.

    `tokenizer` is a tokenizer of transformers, for images a processor, or what `--tokenizer` takes.
    `output` is the PREFIX of the files; without one they are temporary and end with the returned
    data set. In a run of several processes give an `output`, let one process call this, and open
    the PREFIX in all.

    Raises InputError if a row is wrong, or the data set is streamed or has several splits.
    """
    if not hasattr(dataset, "save_to_disk") or hasattr(dataset, "keys"):
        raise InputError(
            f"{type(dataset).__name__} is not one split of a data set in memory: give a "
            'datasets.Dataset, such as load_dataset(…)["train"]; streamed data sets are built by '
            "the command megatron-prefix build"
        )
    if not dataset.num_rows:
        raise InputError("the data set contains no row")
    options = options or BuildOptions()
    folder = tempfile.TemporaryDirectory(prefix="megatron_prefix.")
    prefix = Path(folder.name) / "data" if output is None else output
    try:
        rows = Path(folder.name) / "rows"
        dataset.save_to_disk(str(rows))
        build_dataset([rows], _tokenizer(tokenizer, options), prefix, options)
        built = PreferenceDataset(prefix, check=False)
    except BaseException:
        folder.cleanup()
        raise
    if output is None:
        weakref.finalize(built, folder.cleanup)
    else:
        folder.cleanup()
    return built


def _tokenizer(given: Any, options: BuildOptions) -> Tokenizer:
    if isinstance(given, Tokenizer):
        return given
    if isinstance(given, str | Path):
        return load_tokenizer(given, options.parse_special)
    if not hasattr(given, "save_pretrained"):
        raise InputError(
            f"tokenizer {type(given).__name__}: give a tokenizer or processor of transformers, its "
            "directory or hub id, a SentencePiece model file, or bytes"
        )
    with tempfile.TemporaryDirectory(prefix="megatron_prefix.") as folder:
        given.save_pretrained(folder)  # `given` itself is not changed: it may be in use
        tokenizer = load_tokenizer(folder, options.parse_special)
        if not tokenizer.no_images:
            tokenizer.image_processor()  # while its files are there
    tokenizer.name = getattr(given, "tokenizer", given).name_or_path
    return tokenizer
