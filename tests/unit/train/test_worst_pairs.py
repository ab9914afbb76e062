"""The pairs with the worst margin: the right ones, with their own texts."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megatron_prefix.data.build import build_dataset
from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.errors import RunError
from megatron_prefix.train.examples import MOST_PAIRS, worst_pairs, write_examples


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> PreferenceDataset:
    folder = tmp_path_factory.mktemp("examples")
    records = [
        {"prompt": f"question {i} ", "chosen": f"good {i}", "rejected": f"bad {i}"}
        for i in range(12)
    ]
    path = folder / "in.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    build_dataset([path], "bytes", folder / "set")
    return PreferenceDataset(folder / "set")


def test_the_worst_come_first_with_their_texts(dataset):
    scores = np.arange(24.0).reshape(12, 2)
    scores[:, 0] += np.arange(12)[::-1]
    pairs = worst_pairs(dataset, scores.ravel(), np.zeros(24), "held")
    assert [pair["group"] for pair in pairs] == [11, 10, 9, 8, 7, 6, 5, 4] and len(pairs) == 8
    first = pairs[0]
    assert first["margin"] == scores[11, 0] - scores[11, 1] and first["set"] == "held"
    assert first["prompt"].endswith("question 11 ") and first["record"] == 11
    assert first["chosen"].startswith("good 11") and first["rejected"].startswith("bad 11")


def test_the_reference_is_taken_off(dataset):
    reference = np.zeros(24)
    reference[6] = 5.0  # the chosen response of group 3
    assert worst_pairs(dataset, np.zeros(24), reference)[0]["group"] == 3


def test_of_several_sets_the_worst_are_written(tmp_path):
    pairs = [{"margin": float(i), "group": i} for i in range(20)][::-1]
    write_examples(str(tmp_path), 7, pairs)
    written = json.loads((tmp_path / "examples.json").read_text())
    assert written["step"] == 7
    assert [pair["group"] for pair in written["pairs"]] == list(range(MOST_PAIRS))


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(RunError, match="examples.json could not be written"):
        write_examples(str(tmp_path / "absent"), 1, [])
