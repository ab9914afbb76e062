"""The column `beta` of a record: the pair's own beta, from the record to the row."""

import json

import numpy as np
import pytest

from megatron_prefix.__main__ import main
from megatron_prefix.data.build import BuildOptions, build_dataset
from megatron_prefix.data.steps.compositions.batches import InOrder
from megatron_prefix.data.steps.sampler import Sampler
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.data.store.verify.checks import verify_dataset
from megatron_prefix.errors import InputError

RECORDS = [
    {"prompt": "p", "chosen": " yes", "rejected": " no"},
    {"prompt": "p", "chosen": " yes", "rejected": " nope", "beta": 0.5},
    {"prompt": "q", "chosen": "x", "rejected": "y", "beta": None},
    {"prompt": "r", "chosen": "x", "rejected": "y", "beta": 2},
]
BETAS = [np.nan, 0.5, np.nan, 2.0]
RANKED = {"prompt": "p", "responses": ["a", "b", "c"], "scores": [3, 2, 1]}


def build(tmp_path, records, **options):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    build_dataset([path], "bytes", tmp_path / "out", BuildOptions(overwrite=True, **options))
    dataset = PreferenceDataset(tmp_path / "out")
    verify_dataset(dataset)
    return dataset


def test_a_record_has_the_beta_of_its_pair(tmp_path):
    dataset = build(tmp_path, RECORDS)
    assert "pair_betas" in dataset.columns
    assert np.array_equal(dataset.pair_betas, BETAS, equal_nan=True)
    for sharing in ("tree", "pair", "response", "none"):
        sampler = Sampler(
            dataset=dataset, composition=InOrder(4, 4), sharing=sharing, row_capacity=100
        )
        (row,) = sampler.micro_batches(sampler.step(0))
        order = np.argsort(row.pair_ids[:, 0])
        assert np.array_equal(row.pair_betas[order], BETAS, equal_nan=True)


def test_records_without_a_beta_make_no_column(tmp_path):
    dataset = build(tmp_path, RECORDS[:1])
    assert "pair_betas" not in dataset.columns and np.isnan(dataset.pair_betas).all()


def test_merged_prompts_keep_the_beta_of_each_pair(tmp_path):
    dataset = build(tmp_path, RECORDS, merge_prompts=True)
    assert np.array_equal(dataset[0].pair_betas, BETAS[:2], equal_nan=True)


@pytest.mark.parametrize(
    ("beta", "message"), [(0, "above 0"), (-1.0, "above 0"), ("0.1", "must be a number")]
)
def test_a_beta_that_is_none_is_refused_with_its_line(tmp_path, beta, message):
    with pytest.raises(InputError, match=rf"in\.jsonl, line 2: .*beta.*{message}"):
        build(tmp_path, [RECORDS[0], {**RECORDS[0], "beta": beta}])


def test_a_beta_of_several_pairs_is_refused(tmp_path):
    build(tmp_path, [{**RANKED, "responses": ["a", "b"], "scores": [2, 1], "beta": 0.5}])
    assert PreferenceDataset(tmp_path / "out").pair_betas.tolist() == [0.5]
    with pytest.raises(InputError, match=r"'beta' belongs to one pair, and the record has 3: "):
        build(tmp_path, [{**RANKED, "beta": 0.5}])
    path = tmp_path / "in.jsonl"
    flags = ["--tokenizer", "bytes", "--output", str(tmp_path / "out"), "--ignore-columns", "beta"]
    flags += ["--overwrite"]
    assert main(["build", "--input", str(path), *flags]) == 0
    assert np.isnan(PreferenceDataset(tmp_path / "out").pair_betas).all()
