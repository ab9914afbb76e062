"""The model's tokenizer against that of the data: equal, another, or not known."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_prefix.checkpoint import vocabulary
from megatron_prefix.errors import InputError


def dataset(hash: str | None) -> SimpleNamespace:
    """A data set as far as its manifest's tokenizer goes."""
    entry = {"name": "bytes", "vocab_size": 258}
    if hash is not None:
        entry["vocabulary"] = hash
    return SimpleNamespace(prefix="hh", manifest={"tokenizer": entry})


@pytest.fixture
def compare(tmp_path, monkeypatch):
    """Compare a model whose tokenizers have the vocabularies of `files` with data sets."""

    def run(files: dict[str, str], *hashes: str | None) -> str | None:
        for name in files:
            (tmp_path / name).touch()

        def load(spec: str) -> SimpleNamespace:
            name = "tokenizer.json" if spec == str(tmp_path) else spec.rsplit("/", 1)[1]
            if name not in files:
                raise ValueError("damaged")
            return SimpleNamespace(describe=lambda: {"vocabulary": files[name]})

        monkeypatch.setattr(vocabulary, "load_tokenizer", load)
        return vocabulary.compare_vocabularies(tmp_path, [dataset(hash) for hash in hashes])

    return run


def test_one_vocabulary_needs_no_words(compare):
    assert compare({"tokenizer.json": "a"}, "a", "a") is None


@pytest.mark.parametrize("hashes", [("b",), ("a", "b"), (None, "b")])
def test_another_vocabulary_is_refused(compare, hashes, tmp_path):
    with pytest.raises(InputError) as caught:
        compare({"tokenizer.json": "a"}, *hashes)
    message = str(caught.value)
    assert message.startswith("data set hh was built with tokenizer bytes (258 entries)")
    assert f"--tokenizer {tmp_path}" in message and "model.allow_other_tokenizer: true" in message


def test_a_sentencepiece_model_of_the_directory_is_its_tokenizer_too(compare):
    files = {"tokenizer.json": "a", "tokenizer.model": "b"}
    assert compare(files, "b") is None and compare(files, "a") is None
    with pytest.raises(InputError):
        compare(files, "c")


def test_what_cannot_be_compared_is_told(compare):
    assert "a data set of version 2" in compare({"tokenizer.json": "a"}, None, None)


def test_a_model_without_a_tokenizer_is_told(compare):
    assert "has no tokenizer" in compare({"tokenizer_config.json": "a"}, "b")


def test_a_damaged_tokenizer_is_refused(compare):
    with pytest.raises(InputError, match=r"cannot be loaded \(damaged\): .*allow_other_tokenizer"):
        compare({"vocab.json": "a"}, "a")
