"""from_hf_dataset gives what the command gives."""

from __future__ import annotations

import gc
import json

import datasets
import numpy as np
import pytest

import megatron_prefix as mp
from megatron_prefix.data.build import build_dataset, from_hf_dataset
from megatron_prefix.errors import InputError

ROWS = [
    {"prompt": "1 + 1 = ", "chosen": "2.", "rejected": "3."},
    {"prompt": "2 + 1 = ", "chosen": "3.", "rejected": "4."},
]


def same(left: mp.PreferenceDataset, right: mp.PreferenceDataset) -> bool:
    return left.fingerprint == right.fingerprint and np.array_equal(left.tokens, right.tokens)


def built(tmp_path, tokenizer="bytes", **options) -> mp.PreferenceDataset:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    build_dataset([tmp_path / "rows.jsonl"], tokenizer, tmp_path / "by_file", **options)
    return mp.PreferenceDataset(tmp_path / "by_file")


def test_the_trees_are_those_of_the_command(tmp_path):
    rows = datasets.Dataset.from_list(ROWS)
    data = from_hf_dataset(rows, "bytes", tmp_path / "by_rows")
    assert same(data, built(tmp_path))
    assert data.prefix == tmp_path / "by_rows"


def test_options_are_followed(tmp_path):
    options = mp.BuildOptions(columns={"prompt": "question"})
    rows = datasets.Dataset.from_list(ROWS).rename_column("prompt", "question")
    assert same(from_hf_dataset(rows, "bytes", options=options), built(tmp_path))


def test_a_subset_is_what_is_built(tmp_path):
    rows = datasets.Dataset.from_list(ROWS).select([1])
    data = from_hf_dataset(rows, "bytes")
    assert len(data) == 1
    assert bytes(t for t in data.tokens.tolist() if t < 256).startswith(b"2 + 1")


def test_without_an_output_the_files_end_with_the_data():
    data = from_hf_dataset(datasets.Dataset.from_list(ROWS), "bytes")
    folder = data.prefix.parent
    assert folder.is_dir()
    del data
    gc.collect()
    assert not folder.exists()


def test_a_loaded_tokenizer_is_used_and_left_as_it_was(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0, "2": 1}, unk_token="?"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="?", eos_token="2", model_max_length=7
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    data = from_hf_dataset(datasets.Dataset.from_list(ROWS), tokenizer)
    assert same(data, built(tmp_path, str(tmp_path / "tokenizer")))
    assert tokenizer.model_max_length == 7


@pytest.mark.parametrize(
    "dataset, tokenizer, reason",
    [
        (ROWS, "bytes", "give a datasets.Dataset"),
        (datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)), "bytes", "one split"),
        (datasets.Dataset.from_list(ROWS).to_iterable_dataset(), "bytes", "streamed"),
        (datasets.Dataset.from_list(ROWS).select([]), "bytes", "no row"),
        (datasets.Dataset.from_list(ROWS), 7, "tokenizer int"),
        (datasets.Dataset.from_list(ROWS).remove_columns("chosen"), "bytes", "chosen"),
    ],
)
def test_what_cannot_be_built_is_refused(dataset, tokenizer, reason, tmp_path):
    with pytest.raises(InputError, match=reason):
        from_hf_dataset(dataset, tokenizer, tmp_path / "out")
    assert not list(tmp_path.iterdir())
