"""A sidecar is read back as it was written, or refused; scores so far fit, or are ignored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.data.store.writer import DatasetWriter
from megatron_prefix.errors import InputError, RunError
from megatron_prefix.reference import write_sidecar
from megatron_prefix.reference.sidecars import PartialScores, read_sidecar
from megatron_prefix.testing import write_random_set

MODEL = "12" * 32


def dataset_of(folder: Path, seed: int, num_groups: int) -> PreferenceDataset:
    return PreferenceDataset(write_random_set(folder / f"set{seed}", seed, num_groups))


@pytest.fixture(scope="module")
def datasets(tmp_path_factory) -> list[PreferenceDataset]:
    folder = tmp_path_factory.mktemp("sets")
    return [dataset_of(folder, 0, 8), dataset_of(folder, 1, 5)]


def logps_of(dataset: PreferenceDataset) -> np.ndarray:
    return -np.random.default_rng(0).random(len(dataset.response_lengths))


@pytest.fixture(scope="module")
def sidecar(datasets, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sidecar") / "ref"
    write_sidecar(str(path), MODEL, [(dataset, logps_of(dataset)) for dataset in datasets])
    return path


def test_every_data_set_is_read_back(datasets, sidecar):
    for dataset in datasets:
        logps = read_sidecar(str(sidecar), MODEL, dataset)
        assert logps.dtype == np.float64 and np.array_equal(logps, logps_of(dataset))
    assert [path.name for path in sidecar.parent.iterdir()] == ["ref"]


def test_the_same_scores_are_the_same_bytes(datasets, sidecar, tmp_path):
    write_sidecar(str(tmp_path / "ref"), MODEL, [(x, logps_of(x)) for x in datasets])
    assert (tmp_path / "ref").read_bytes() == sidecar.read_bytes()


def refusal(path: Path, model: str, dataset: PreferenceDataset) -> str:
    with pytest.raises(InputError) as refused:
        read_sidecar(str(path), model, dataset)
    message = str(refused.value)
    assert message.startswith(f"{path}: ")
    return message


def test_another_model_is_refused_with_both_fingerprints(datasets, sidecar):
    message = refusal(sidecar, "34" * 32, datasets[0])
    assert "reference model" in message and "12" * 8 in message and "34" * 8 in message


def test_another_data_set_is_refused_with_both_fingerprints(datasets, sidecar, tmp_path):
    third = dataset_of(tmp_path, 5, 4)
    message = refusal(sidecar, MODEL, third)
    assert str(third.prefix) in message
    assert all(x.fingerprint[:16] in message for x in (*datasets, third))


def test_another_tokenizer_is_refused_with_both_fingerprints(datasets, sidecar, tmp_path):
    """The same tokens, described as those of another tokenizer."""
    described = {**datasets[0].manifest["tokenizer"], "fingerprint": "ab" * 32}
    with DatasetWriter(tmp_path / "other", described) as writer:
        writer.add(datasets[0][0], 0)
        writer.finish()
    message = refusal(sidecar, MODEL, PreferenceDataset(tmp_path / "other"))
    ours = datasets[0].manifest["tokenizer"]["fingerprint"][:16]
    assert "tokenizer" in message and ours in message and "ab" * 8 in message


def changed(data: bytearray, damage: str) -> bytearray:
    if damage == "value":
        data[-3] ^= 1
    elif damage == "header":
        data[40] ^= 1
    elif damage == "cut":
        del data[-8:]
    elif damage == "longer":
        data += b"12345678"
    return bytearray() if damage == "empty" else data


@pytest.mark.parametrize("damage", ["value", "header", "cut", "longer", "empty", "absent"])
def test_a_damaged_file_is_refused(datasets, sidecar, tmp_path, damage):
    path = tmp_path / "ref"
    if damage != "absent":
        path.write_bytes(changed(bytearray(sidecar.read_bytes()), damage))
    for dataset in datasets:
        refusal(path, MODEL, dataset)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda logps: logps[:-1], "does not fit"),
        (lambda logps: logps.astype(np.float32), "float32"),
        (lambda logps: logps * np.nan, "not log-probabilities"),
        (lambda logps: -logps, "not log-probabilities"),
    ],
    ids=["too few", "float32", "nan", "above 0"],
)
def test_a_sound_file_with_other_values_is_refused(datasets, tmp_path, wrong, words):
    (dataset, _), path = datasets, tmp_path / "ref"
    write_sidecar(str(path), MODEL, [(dataset, wrong(logps_of(dataset)))])
    assert words in refusal(path, MODEL, dataset)


def test_a_file_that_cannot_be_written_leaves_nothing(datasets, tmp_path):
    (tmp_path / "ref").mkdir()
    with pytest.raises(RunError, match="--output .*ref: cannot be written"):
        write_sidecar(str(tmp_path / "ref"), MODEL, [(x, logps_of(x)) for x in datasets])
    assert [path.name for path in tmp_path.iterdir()] == ["ref"]


KEY = {"model": "m", "data": "d"}


@pytest.fixture
def partial(tmp_path) -> PartialScores:
    """Scores after 4 steps, saved."""
    partial = PartialScores(str(tmp_path / "ref"), "name", KEY, 3)
    partial.sums = np.arange(6.0).reshape(2, 3)
    partial.save(4)
    return partial


def test_scores_so_far_are_found_again(partial, tmp_path):
    again = PartialScores(str(tmp_path / "ref"), "name", KEY, 3)
    assert again.step == 4 and np.array_equal(again.sums, partial.sums)
    again.discard()
    assert list(tmp_path.iterdir()) == []
    assert PartialScores(str(tmp_path / "ref"), "name", KEY, 3).step == 0


@pytest.mark.parametrize("other", ["key", "responses", "cut", "flipped", "nonsense"])
def test_scores_that_do_not_fit_are_ignored(partial, tmp_path, other):
    (file,) = (tmp_path / "ref.partial").iterdir()
    data, key, num_responses = bytearray(file.read_bytes()), dict(KEY), 3
    if other == "key":
        key["model"] = "another"
    elif other == "responses":
        num_responses = 4
    elif other == "cut":
        del data[len(data) // 2 :]
    elif other == "flipped":
        data[data.index(np.float64(5.0).tobytes())] ^= 16
    else:
        data = bytearray(b"nothing of the kind")
    file.write_bytes(data)
    fresh = PartialScores(str(tmp_path / "ref"), "name", key, num_responses)
    assert fresh.step == 0 and not fresh.sums.any()


def test_scores_that_cannot_be_saved_end_the_scoring(partial, tmp_path):
    file = tmp_path / "ref.partial" / "name.npz"
    file.unlink()
    file.mkdir()
    with pytest.raises(RunError, match="--output .*ref: cannot be written"):
        partial.save(5)
    assert list(file.parent.iterdir()) == [file], "a temporary file is left"
