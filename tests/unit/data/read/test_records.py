"""The sources of records: JSON files, compressed files, Parquet, Hugging Face data sets."""

import gzip
import json
import random
import zlib
from pathlib import Path

import pytest

from megatron_prefix.__main__ import main
from megatron_prefix.data.build import BuildOptions, build_dataset
from megatron_prefix.data.read import Inputs
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
    return [(r.line, r.value, r.error) for r in Inputs([path], split).read()]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_parquet(path, records=RECORDS):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


def test_lines_arrays_and_gzip_are_distinguished_by_content(tmp_path):
    lines = '{"a": 1}\n\n  \n{"a": 2}'
    expected = [(1, {"a": 1}, None), (4, {"a": 2}, None)]
    assert items(write(tmp_path / "x.json", lines)) == expected
    assert items(write(tmp_path / "bom", b"\xef\xbb\xbf" + lines.encode())) == expected
    assert items(write(tmp_path / "zipped.jsonl", gzip.compress(lines.encode()))) == expected
    array = ' [\n {"a":\n 1},\n {"a": 2} ]\n'
    assert items(write(tmp_path / "array.jsonl", array)) == [
        (2, {"a": 1}, None),
        (4, {"a": 2}, None),
    ]


def test_numbers_count_over_files_and_over_unreadable_records(tmp_path):
    first = write(tmp_path / "1", '{"a": 1}\nnot\n')
    second = write(tmp_path / "2", '{"a": 2}\n')
    records = list(Inputs([first, second]).read())
    assert [(r.number, r.path, r.line, r.error is None) for r in records] == [
        (0, first, 1, True),
        (1, first, 2, False),
        (2, second, 1, True),
    ]


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        (b"", 1, "contains no record"),
        (b"\n \n", 1, "contains no record"),
        (b"[]", 1, "contains no record"),
        (b'{"a": 1}\n{"a', 2, "the file may be cut off"),
        (b'{"a": 1}\n"text"\n', 2, "is text, not an object"),
        (b'{"a": 1}\n{"a": "\xe9"}\n', 2, "not UTF-8"),
        (b'[{"a": 1},\n 3]', 2, "is a number"),
        (b'[{"a": 1}\n{"a": 2}]', 2, "comma"),
        (b'[{"a": 1},\n {"a"', 2, "not JSON"),
        (b'[{"a": 1}] x', 1, "after the end"),
        (b'[{"a": "\xe9"}]', 1, "not UTF-8"),
        (b"[" * 100_000, 1, "nested too deeply"),
        (b'{"a":' * 100_000, 1, "nested too deeply"),
        (b"\x1f\x8b\x08\x00broken", 1, "gzip data is damaged"),
        (gzip.compress(b'{"a": 1}\n' * 9999)[:-20], None, "gzip data is damaged"),
    ],
)
def test_unreadable_files_name_the_line(tmp_path, content, line, message):
    errors = [(n, error) for n, _, error in items(write(tmp_path / "in.jsonl", content)) if error]
    assert len(errors) == 1 and message in errors[0][1]
    assert line is None or errors[0][0] == line


def test_inputs_of_other_kinds_are_refused_before_reading(tmp_path):
    with pytest.raises(InputError, match="zip"):
        Inputs([write(tmp_path / "in.jsonl", b"PK\x03\x04...")]).check()
    folder = tmp_path / "empty"
    folder.mkdir()
    with pytest.raises(InputError, match="cannot be read as a Hugging Face data set"):
        Inputs([folder]).check()
    with pytest.raises(InputError, match="no such file"):
        Inputs([tmp_path / "absent"]).check()


def test_zstd_is_seen_by_content_and_streamed(tmp_path):
    expected = [(i + 1, record, None) for i, record in enumerate(RECORDS)]
    assert items(write(tmp_path / "x.jsonl", zstd(LINES))) == expected
    array = json.dumps(RECORDS).encode()
    assert [v for _, v, _ in items(write(tmp_path / "y", zstd(array)))] == RECORDS
    frames = write(tmp_path / "two.zst", zstd(LINES) + zstd(LINES))
    assert [v for _, v, _ in items(frames)] == RECORDS * 2
    positions = []
    inputs = Inputs([frames, frames])
    list(inputs.scan(positions.append))
    assert positions == sorted(positions) and positions[-1] == inputs.num_bytes


@pytest.mark.parametrize("cut", [lambda data: data[:-6], lambda data: data[:6] + b"broken"])
def test_damaged_zstd_names_the_line(tmp_path, cut):
    records = items(write(tmp_path / "x", cut(zstd(LINES * 2000))))
    assert "zstd data is damaged or cut off" in records[-1][2]
    assert records[-1][0] == len(records)


def test_parquet_rows_are_records(tmp_path):
    path = write_parquet(tmp_path / "x.bin")
    assert items(path) == [(1, RECORDS[0], None), (2, RECORDS[1], None)], "nulls are left out"
    assert [r.place for r in Inputs([path]).read()][1] == f"{path}, row 2"
    assert "contains no row" in items(write_parquet(tmp_path / "none", RECORDS[:0]))[0][2]
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
        build_dataset([path], "bytes", tmp_path / "out", BuildOptions(split=split, overwrite=True))
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
        (tmp_path / "splits", None, "has the splits train, test: choose one with --split"),
        (tmp_path / "splits", "valid", "--split valid: .* has the splits train, test"),
        (tmp_path / "saved", "train", "has only one split: remove the flag"),
        (plain, "train", "only those have splits"),
    ):
        with pytest.raises(InputError, match=message):
            Inputs([path], split).check()


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
def test_missing_files_are_not_hub_ids(name):
    with pytest.raises(InputError, match="no such file"):
        Inputs([Path(name)]).check()


def test_a_cut_gzip_file_gives_every_whole_line_before_the_cut(tmp_path):
    lines = [b'{"a": "%s"}\n' % random.Random(i).randbytes(200).hex().encode() for i in range(99)]
    whole = gzip.compress(b"".join(lines))
    for cut in (whole[: len(whole) // 2], whole[:-20], whole + b"garbage"):
        readable = zlib.decompressobj(31).decompress(cut).count(b"\n")
        *good, last = items(write(tmp_path / "cut", cut))
        assert len(good) == readable and all(value for _, value, _ in good)
        assert "damaged or cut off; nothing after it is read" in last[2]
