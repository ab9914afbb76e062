"""Several processes write the same bytes as one, and end in the same way."""

import json
import os
import signal

import pytest

from megatron_prefix.data.build import BuildOptions, build_dataset, merge_datasets
from megatron_prefix.data.build import chunks as chunks_module
from megatron_prefix.data.build.workers import ordered
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.data.store.manifest import FILES, suffix_path
from megatron_prefix.data.store.verify.checks import verify_dataset
from megatron_prefix.errors import InputError, RunError


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunks_module, "CHUNK", 3)
    monkeypatch.setattr(chunks_module, "FIRST_CHUNK", 3)


def records(start, stop):
    """Good records, but each seventh has no difference and each eleventh lacks a column."""
    rows = []
    for i in range(start, stop):
        row = {"prompt": f"Say {i}: " * (i % 5 + 1), "chosen": f"yes {i}", "rejected": "no" * 3}
        if i % 7 == 3:
            row["rejected"] = row["chosen"]
        if i % 11 == 5:
            del row["chosen"]
        rows.append(row)
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def assert_same_bytes(a, b):
    for name in (*FILES, ".json"):
        assert suffix_path(a, name).read_bytes() == suffix_path(b, name).read_bytes(), name


@pytest.mark.parametrize("workers", [2, 3])
def test_the_same_bytes_whatever_the_number_of_workers(tmp_path, workers):
    path = write(tmp_path / "in.jsonl", records(0, 60))
    reports = []
    for number in (1, workers):
        options = BuildOptions(on_error="skip", workers=number, max_length=40, overflow="drop")
        reports.append(build_dataset([path, path], "bytes", tmp_path / f"of{number}", options))
    assert_same_bytes(tmp_path / "of1", tmp_path / f"of{workers}")
    first, second = reports
    assert first.as_dict() == second.as_dict() and first.num_tokens_made == second.num_tokens_made
    assert first.num_records == 120 and first.wrong.num_records == 10
    verify_dataset(PreferenceDataset(tmp_path / "of1"))


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_stops_at_the_first_wrong_record(tmp_path, workers):
    rows = records(0, 60)
    path = write(tmp_path / "in.jsonl", rows)
    with pytest.raises(InputError, match="line 6: .*chosen"):
        build_dataset([path], "bytes", tmp_path / "out", BuildOptions(workers=workers))
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_the_format_of_the_first_records_holds_for_all_chunks(tmp_path):
    """The eighth record is the first good one: chunks built before it is known are built again."""
    rows = [{"x": 1}] * 7 + records(0, 4) + [{"chosen": "\n\nHuman: a", "rejected": "b"}]
    path = write(tmp_path / "in.jsonl", rows * 2)
    for workers in (1, 3):
        options = BuildOptions(on_error="skip", workers=workers)
        build_dataset([path], "bytes", tmp_path / f"of{workers}", options)
    assert_same_bytes(tmp_path / "of1", tmp_path / "of3")


def test_an_error_of_a_chunk_read_in_a_stale_state_is_ignored(tmp_path):
    """In the first records' format the long prompt would be an error; it is a mixed format."""
    wrong, hh = {"x": 1}, {"chosen": "\n\nHuman: a\n\nAssistant: b"}
    hh["rejected"] = hh["chosen"] + "c"
    long = {"prompt": "p" * 99, "chosen": "x", "rejected": "y"}
    path = write(tmp_path / "in.jsonl", [wrong] * 3 + [hh] * 3 + [long] * 9 + [hh] * 3)
    for workers in (1, 3):
        options = BuildOptions(on_error="skip", workers=workers, max_length=60)
        report = build_dataset([path], "bytes", tmp_path / f"of{workers}", options)
        assert report.wrong.num_records == 12
    assert_same_bytes(tmp_path / "of1", tmp_path / "of3")


def die(item):
    if item == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def test_a_worker_that_is_killed_is_reported(tmp_path):
    with pytest.raises(RunError, match="worker process ended .* fewer --workers"):
        list(ordered(die, range(50), 2))


def refuse(item):
    if item == 5:
        raise InputError("five")
    return 2 * item


def test_results_come_in_order_and_errors_after_them():
    for workers in (1, 3):
        results = []
        with pytest.raises(InputError, match="five"):
            for item, result in ordered(refuse, range(50), workers):
                results.append((item, result))
        assert results == [(i, 2 * i) for i in range(5)]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupt_leaves_nothing(tmp_path, workers):
    path = write(tmp_path / "in.jsonl", [r for r in records(0, 60) if "chosen" in r])

    def interrupt(position, total, groups):
        if groups > 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_dataset(
            [path], "bytes", tmp_path / "out", BuildOptions(workers=workers), progress=interrupt
        )
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_no_worker_at_all_is_refused():
    with pytest.raises(InputError, match="--workers is 0"):
        BuildOptions(workers=0)


class TestMerge:
    def build(self, folder, name, *parts, **options):
        options = BuildOptions(on_error="skip", **options)
        build_dataset([folder / part for part in parts], "bytes", folder / name, options)
        return folder / name

    @pytest.fixture
    def parts(self, tmp_path):
        for i, (start, stop) in enumerate([(0, 20), (20, 25), (25, 60)]):
            rows = records(start, stop)
            write(tmp_path / f"{i}.jsonl", [*rows, rows[1]])  # a duplicate in each
        return tmp_path

    def test_parts_have_the_bytes_of_the_whole(self, parts):
        whole = self.build(parts, "whole", "0.jsonl", "1.jsonl", "2.jsonl")
        prefixes = [self.build(parts, f"part{i}", f"{i}.jsonl") for i in range(3)]
        merge_datasets(prefixes, parts / "merged")
        assert_same_bytes(whole, parts / "merged")
        verify_dataset(PreferenceDataset(parts / "merged"))

    def test_another_tokenizer_or_option_is_refused(self, parts):
        first = self.build(parts, "a", "0.jsonl")
        second = self.build(parts, "b", "1.jsonl", eos="never")
        with pytest.raises(InputError, match="tokenizer end_of_text .*never.*, .* has .*auto"):
            merge_datasets([first, second], parts / "merged")
        assert not list(parts.glob("*merged*"))

    def test_a_damaged_part_is_refused(self, parts):
        first = self.build(parts, "a", "0.jsonl")
        tokens = bytearray((parts / "a.bin").read_bytes())
        tokens[3] ^= 1
        (parts / "a.bin").write_bytes(tokens)
        with pytest.raises(InputError, match="a.bin is damaged"):
            merge_datasets([first], parts / "merged")
