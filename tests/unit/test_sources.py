"""Where records come from: compressed lines, Parquet, Hugging Face data sets."""

import gzip
import json
import random
import zlib
from pathlib import Path

import pytest

from megatron_prefix.__main__ import main
from megatron_prefix.data.build.builder import BuildOptions, build_dataset
from megatron_prefix.data.read.records import check_inputs, input_bytes, read_records, scan_records
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.errors import InputError

RECORDS = [
    {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 2.0, "extra": {"k": [1, 2]}},
    {"prompt": "d", "chosen": "e", "rejected": "f"},
]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


def zstd(data):
    import pyarrow

    return pyarrow.Codec("zstd").compress(data).to_pybytes()


def items(path, split=None):
    return [(r.line, r.value, r.error) for r in read_records([path], split=split)]


def write(path, content):
    path.write_bytes(content)
    return path


def write_parquet(path, records=RECORDS):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


def test_zstd_is_seen_by_content_and_streamed(tmp_path):
    expected = [(i + 1, record, None) for i, record in enumerate(RECORDS)]
    assert items(write(tmp_path / "x.jsonl", zstd(LINES))) == expected
    array = json.dumps(RECORDS).encode()
    assert [v for _, v, _ in items(write(tmp_path / "y", zstd(array)))] == RECORDS
    frames = write(tmp_path / "two.zst", zstd(LINES) + zstd(LINES))
    assert [v for _, v, _ in items(frames)] == RECORDS * 2
    heard = []
    list(scan_records([frames, frames], heard.append))
    assert heard == sorted(heard) and heard[-1] == input_bytes([frames, frames])


@pytest.mark.parametrize("cut", [lambda data: data[:-6], lambda data: data[:6] + b"broken"])
def test_damaged_zstd_names_the_line(tmp_path, cut):
    found = items(write(tmp_path / "x", cut(zstd(LINES * 2000))))
    assert "zstd data is damaged or cut off" in found[-1][2]
    assert found[-1][0] == len(found)


def test_parquet_rows_are_records(tmp_path):
    path = write_parquet(tmp_path / "x.bin")
    assert items(path) == [(1, RECORDS[0], None), (2, RECORDS[1], None)], "nulls are left out"
    assert [r.where for r in read_records([path])][1] == f"{path}, row 2"
    assert "holds no row" in items(write_parquet(tmp_path / "none", RECORDS[:0]))[0][2]
    broken = write(tmp_path / "broken", b"PAR1" + bytes(50))
    assert "damaged or cut off" in items(broken)[0][2]


def test_all_sources_make_the_same_data_set(tmp_path):
    import datasets

    table = datasets.Dataset.from_list(RECORDS)
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(
        tmp_path / "splits"
    )
    (tmp_path / "folder").mkdir()
    write_parquet(tmp_path / "folder" / "train.parquet")
    (tmp_path / "lines").mkdir()
    write(tmp_path / "lines" / "data.jsonl", LINES)
    sources = {
        write(tmp_path / "plain.jsonl", LINES): None,
        write(tmp_path / "zipped", gzip.compress(LINES)): None,
        write(tmp_path / "zstd", zstd(LINES)): None,
        write_parquet(tmp_path / "x.parquet"): None,
        tmp_path / "saved": None,
        tmp_path / "splits": "train",
        tmp_path / "folder": None,
        tmp_path / "lines": "train",
    }
    fingerprints = set()
    for path, split in sources.items():
        build_dataset([path], "bytes", tmp_path / "out", BuildOptions(split=split))
        dataset = PreferenceDataset(tmp_path / "out")
        fingerprints.add(dataset.fingerprint)
        assert dataset.pair_margins.tolist()[0] == 2.0, path
    assert len(fingerprints) == 1


def test_splits_that_cannot_be_used(tmp_path):
    import datasets

    table = datasets.Dataset.from_list(RECORDS)
    table.save_to_disk(tmp_path / "saved")
    both = datasets.DatasetDict({"train": table, "test": table})
    both.save_to_disk(tmp_path / "splits")
    plain = write(tmp_path / "plain.jsonl", LINES)
    for path, split, message in (
        (tmp_path / "splits", None, "has the splits train, test: name one with --split"),
        (tmp_path / "splits", "valid", "--split valid: .* has the splits train, test"),
        (tmp_path / "saved", "train", "is a single split: leave the flag out"),
        (plain, "train", "only those have splits"),
    ):
        with pytest.raises(InputError, match=message):
            check_inputs([path], split)


def test_a_hub_id_out_of_reach_is_bad_input(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    flags = ["--input", "some-one/no-such-set", "--tokenizer", "bytes", "--output", "out"]
    assert main(["build", *flags, "--split", "train"]) == 2
    error = capsys.readouterr().err
    assert "some-one/no-such-set cannot be read as a Hugging Face data set" in error
    assert "offline" in error and error.count("\n") == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["absent.jsonl", "folder/absent.jsonl", "a/b/c", "x"])
def test_missing_files_are_no_hub_ids(name):
    with pytest.raises(InputError, match="no such file"):
        check_inputs([Path(name)])


def test_a_cut_gzip_file_gives_every_whole_line_before_the_cut(tmp_path):
    lines = [b'{"a": "%s"}\n' % random.Random(i).randbytes(200).hex().encode() for i in range(99)]
    whole = gzip.compress(b"".join(lines))
    for cut in (whole[: len(whole) // 2], whole[:-20], whole + b"garbage"):
        readable = zlib.decompressobj(31).decompress(cut).count(b"\n")
        *found, last = items(write(tmp_path / "cut", cut))
        assert len(found) == readable and all(value for _, value, _ in found)
        assert "damaged or cut off, and nothing behind is read" in last[2]
