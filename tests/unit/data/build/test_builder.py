import gzip
import json
import subprocess
import sys

import numpy as np
import pytest

from megatron_prefix.__main__ import main
from megatron_prefix.data.build import BuildOptions, build_dataset
from megatron_prefix.data.build import chunks as chunks_module
from megatron_prefix.data.read import ExampleReader, Inputs
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.data.store.verify.checks import verify_dataset
from megatron_prefix.data.tokenize import load_tokenizer
from megatron_prefix.errors import InputError

GOOD = {"prompt": "a", "chosen": "b", "rejected": "c"}
SAME = {"prompt": "a", "chosen": "b", "rejected": "b"}
LINE = json.dumps(GOOD) + "\n"


def write(tmp_path, *records, name="in.jsonl"):
    path = tmp_path / name
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("\n".join(lines) + "\n")
    return path


def build(tmp_path, *records, **options):
    given = BuildOptions(**{"overwrite": True, **options})
    report = build_dataset([write(tmp_path, *records)], "bytes", tmp_path / "out", given)
    dataset = PreferenceDataset(tmp_path / "out")
    verify_dataset(dataset)
    return report, dataset


def command(*args):
    return main(["build", "--tokenizer", "bytes", *map(str, args)])


def left(tmp_path):
    return sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith("in."))


def test_a_record_becomes_a_group(tmp_path):
    record = {"prompt": "Hi", "chosen": " yes", "rejected": " you", "margin": 2, "weight": 0.5}
    report, dataset = build(tmp_path, {**record, "score_chosen": 3})
    tree = dataset[0]
    assert load_tokenizer("bytes").decode(tree.tokens) == "<bos>Hi yes<eos>ou<eos>"
    assert tree.node_lengths.tolist() == [3, 2, 3, 3] and tree.parents.tolist() == [-1, 0, 1, 1]
    assert (tree.ranks.tolist(), tree.scores.tolist()[0]) == ([0, 1], 3.0)
    assert np.isnan(tree.scores[1])
    assert (tree.pair_margins.tolist(), tree.pair_weights.tolist()) == ([2.0], [0.5])
    assert dataset.manifest["tokens"] == {"none": 16, "response": 16, "pair": 13, "tree": 11}
    assert dataset.manifest["report"] == report.as_dict()
    assert "end-of-text added to 2 responses (--eos" in report.summary()


def test_degenerate_records_are_dropped_counted_and_listed(tmp_path):
    empty = {"prompt": "a", "chosen": "", "rejected": "c"}
    report, dataset = build(tmp_path, SAME, GOOD, empty, SAME)
    assert len(dataset) == 2 and dataset.group_records.tolist() == [1, 2]
    dropped = dataset.manifest["report"]["dropped"]["chosen equals rejected"]
    assert dropped["groups"] == dropped["num_records"] == 2
    assert dropped["records"] == ["in.jsonl:1", "in.jsonl:4"]
    summary = report.summary()
    assert "chosen equals rejected  2 groups" in summary
    assert "responses of white space only (kept): 1" in summary
    assert "responses, dropped ones too (--eos" in summary


def test_listed_records_are_capped_and_all_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_prefix.data.build.report.MAX_LISTED", 3)
    _, dataset = build(tmp_path, GOOD, *[SAME] * 5, *["x"] * 5, on_error="skip")
    report = dataset.manifest["report"]
    dropped = report["dropped"]["chosen equals rejected"]
    assert (dropped["num_records"], len(dropped["records"])) == (5, 3)
    assert (report["wrong"]["num_records"], len(report["wrong"]["records"])) == (5, 3)


def test_strict_stops_at_the_first_degenerate_record(tmp_path):
    with pytest.raises(InputError, match=r"in\.jsonl, line 2: chosen equals rejected.*--strict"):
        build(tmp_path, GOOD, SAME, strict=True)
    tree = {"text": "q", "role": "prompter", "replies": []}
    for rank, text in enumerate(("a", "b", "a")):
        tree["replies"].append({"text": text, "role": "assistant", "rank": rank, "replies": []})
    with pytest.raises(InputError, match="chosen equals rejected"):
        build(tmp_path, {"prompt": tree}, strict=True)
    assert left(tmp_path) == []
    report, dataset = build(tmp_path, {"prompt": tree})
    assert dataset[0].pairs.tolist() == [[0, 1], [1, 2]]
    assert report.dropped["chosen equals rejected"].pairs == 1


def test_skipping_wrong_records(tmp_path):
    records = [GOOD, "{oops", {"prompt": "a"}, {"chosen": "x y", "rejected": "x z"}, GOOD]
    report, dataset = build(tmp_path, *records, on_error="skip")
    assert dataset.group_records.tolist() == [0, 4] and report.num_records == 5
    wrong = dataset.manifest["report"]["wrong"]
    assert wrong["num_records"] == 3
    assert [text.split(":")[1] for text in wrong["records"]] == ["2", "3", "4"]
    assert "wrong records skipped  3 records" in report.summary()


def test_a_wrong_first_record_sets_no_format(tmp_path):
    _, dataset = build(tmp_path, {"chosen": 3, "rejected": "x"}, GOOD, on_error="skip")
    assert dataset.group_records.tolist() == [1]


def test_nothing_left_after_skipping(tmp_path):
    with pytest.raises(InputError, match=r"in\.jsonl: nothing is left of 2 records: 1 x chosen"):
        build(tmp_path, SAME, "{", on_error="skip")
    assert left(tmp_path) == []


BAD = {
    "not-json": LINE + "{oops\n",
    "missing": LINE + '{"prompt": "a", "chosen": "b"}\n',
    "mistyped": LINE + '{"prompt": 3, "chosen": "b", "rejected": "c"}\n',
    "empty": "",
    "latin1": b'{"prompt": "\xe9", "chosen": "b", "rejected": "c"}\n',
    "null": LINE + '{"prompt": null, "chosen": "b", "rejected": "c"}\n',
    "array": "[1, 2]\n",
    "torn": LINE + LINE[:20],
    "mixed": LINE + '{"conversations": [], "chosen": {}, "rejected": {}}\n',
    "all-same": json.dumps(SAME),
    "gz": b"\x1f\x8b\x08\x00broken",
    "cut-gz": gzip.compress(LINE.encode() * 2999)[:-9],
    "binary": bytes(range(256)) * 8,
    "surrogate": LINE + '{"prompt": "\\ud800", "chosen": "b", "rejected": "c"}\n',
    "utf16": LINE.encode("utf-16"),
    "parquet": b"PAR1" + bytes(100),
    "zstd": b"\x28\xb5\x2f\xfd" + bytes(100),
}


@pytest.mark.parametrize("kind", BAD)
def test_wrong_files_leave_one_message_and_nothing_else(tmp_path, capsys, kind):
    path = tmp_path / "in.jsonl"
    path.write_bytes(BAD[kind] if isinstance(BAD[kind], bytes) else BAD[kind].encode())
    assert command("--input", path, "--output", tmp_path / "o" / "x") == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("megatron-prefix build: error: ") and captured.out == ""
    assert str(path) in captured.err and captured.err.count("\n") == 1
    assert left(tmp_path) == []
    if LINE in str(BAD[kind]):
        assert "line 2" in captured.err


def test_the_command_builds_and_prints_the_summary(tmp_path, capsys):
    path = write(tmp_path, GOOD, SAME)
    assert command("--input", path, path, "--output", tmp_path / "out") == 0
    captured = capsys.readouterr()
    for words in ("groups", "x tree", "chosen equals rejected", "tokens/s", "out.bin"):
        assert words in captured.out
    assert captured.err == "" and len(PreferenceDataset(tmp_path / "out")) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-length", "1"], "at least 2 tokens"),
        (["--overflow", "drop"], "has no effect without --max-length"),
        (["--max-length", "3"], "in.jsonl, line 1: response 0 takes 4 tokens"),
    ],
)
def test_settings_that_cannot_be_used(tmp_path, capsys, flags, message):
    path = write(tmp_path, GOOD)
    assert command("--input", path, "--output", tmp_path / "out", *flags) == 2
    assert message in capsys.readouterr().err and left(tmp_path) == []


@pytest.mark.parametrize("flags", [["--workers", "x"], ["--format", "x"], []])
def test_unknown_flags_and_missing_ones_are_bad_usage(tmp_path, capsys, flags):
    with pytest.raises(SystemExit) as stop:
        main(["build", "--tokenizer", "bytes", "--output", str(tmp_path / "x"), *flags])
    assert stop.value.code == 2 and "error:" in capsys.readouterr().err


def test_only_the_first_rank_prints_errors(tmp_path, capsys, monkeypatch):
    for rank, prints in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        assert command("--input", tmp_path / "absent", "--output", tmp_path / "out") == 2
        assert bool(capsys.readouterr().err) is prints
        with pytest.raises(SystemExit) as stop:
            main(["build"])
        assert stop.value.code == 2 and bool(capsys.readouterr().err) is prints


def test_internal_failures_are_not_hidden(tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr("megatron_prefix.data.build.build_dataset", fail)
    assert command("--input", "x", "--output", "y") == 1
    (message,) = capsys.readouterr().err.splitlines()
    assert "ZeroDivisionError" in message and "a fault of megatron_prefix" in message
    monkeypatch.setattr(
        "megatron_prefix.data.build.build_dataset",
        lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt),
    )
    assert command("--input", "x", "--output", "y") == 130


def test_help_loads_no_heavy_library():
    code = (
        "import sys\nfrom megatron_prefix.__main__ import make_parser\n"
        "make_parser().format_help()\n"
        "assert not {'torch', 'megatron.core', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_overflow_modes_are_counted(tmp_path):
    long = {"prompt": "0123456789", "chosen": "b", "rejected": "c"}
    report, dataset = build(tmp_path, GOOD, long, max_length=6, overflow="drop")
    assert len(dataset) == 1 and report.dropped["over --max-length"].groups == 1
    report, dataset = build(tmp_path, GOOD, long, max_length=6, overflow="truncate-prompt")
    assert dataset.response_lengths.tolist() == [4, 4, 6, 6]
    assert (report.num_cut_groups, report.num_cut_responses, report.num_cut_tokens) == (1, 2, 14)
    assert "truncated  14 prompt tokens of 2 responses in 1 group" in report.summary()


def test_the_same_build_gives_the_same_bytes(tmp_path):
    path = write(tmp_path, GOOD, SAME)
    for name in ("x", "y"):
        build_dataset([path], "bytes", tmp_path / name)
    assert (tmp_path / "x.json").read_bytes() == (tmp_path / "y.json").read_bytes()


def test_progress_is_called_for_all_bytes(tmp_path):
    path = write(tmp_path, *[GOOD] * 200)
    calls = []
    build_dataset([path, path], "bytes", tmp_path / "out", progress=lambda *x: calls.append(x))
    size = path.stat().st_size
    assert len(calls) == 2 and calls[-1] == (2 * size, 2 * size, 400)  # 32 records, and the rest
    assert [c[0] for c in calls] == sorted(c[0] for c in calls)


def test_large_rows_make_small_chunks(tmp_path):
    """Also for a JSON array, whose records are not lines."""
    row = {"prompt": "p" * 200_000, "chosen": ["a" * 100_000], "rejected": "b"}
    lines = tmp_path / "lines.jsonl"
    lines.write_text(f"{json.dumps(row)}\n" * 50)
    array = tmp_path / "array.json"
    array.write_text(json.dumps([row] * 50))
    for path in (lines, array):
        chunks = chunks_module.read_chunks(Inputs([path]), ExampleReader())
        sizes = [len(records) for records, _ in chunks]
        assert sizes == [7] * 7 + [1], path


EXPECTED = {  # groups, responses, pairs
    "hh_pairs": (1800, 3600, 1800),
    "chat_pairs": (225, 450, 225),
    "oasst_trees": (75, 482, 582),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_real_sets(tmp_path, data_dir, name):
    report = build_dataset([data_dir / f"{name}.jsonl.gz"], "bytes", tmp_path / "out")
    dataset = PreferenceDataset(tmp_path / "out")
    verify_dataset(dataset)
    counts = dataset.manifest["counts"]
    assert (counts["groups"], counts["responses"], counts["pairs"]) == EXPECTED[name]
    assert report.dropped == {} and report.wrong.num_records == 0
    assert dataset.group_records.tolist() == list(range(len(dataset)))


def test_real_trees_share_as_much_as_they_should(tmp_path, data_dir):
    build_dataset([data_dir / "oasst_trees.jsonl.gz"], "bytes", tmp_path / "out")
    tokens = PreferenceDataset(tmp_path / "out").manifest["tokens"]
    assert tokens["none"] / tokens["tree"] > 3.2
    assert tokens["none"] > tokens["pair"] > tokens["response"] > tokens["tree"]


def test_real_dialogues_come_back_as_they_were(tmp_path, data_dir):
    path = data_dir / "hh_pairs.jsonl.gz"
    build_dataset([path], "bytes", tmp_path / "out")
    dataset, decode = PreferenceDataset(tmp_path / "out"), load_tokenizer("bytes").decode
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for group, line in enumerate(file):
            record, tree = json.loads(line), dataset[group]
            for response, name in enumerate(("chosen", "rejected")):
                text = decode(tree.response_tokens(response)[0].tolist())
                assert text == f"<bos>{record[name]}<eos>", f"group {group}, {name}"


def test_a_data_set_is_replaced_only_with_overwrite(tmp_path, capsys):
    source = write(tmp_path, {"prompt": "p", "chosen": "a", "rejected": "b"})
    output = tmp_path / "made"
    arguments = ["--input", source, "--output", output]
    assert command(*arguments) == 0
    before = {path: path.read_bytes() for path in tmp_path.glob("made*") if path.is_file()}
    assert command(*arguments, "--no-append-eos") == 2
    assert f"{output}.json is there already" in capsys.readouterr().err
    assert all(path.read_bytes() == content for path, content in before.items())
    assert command(*arguments, "--overwrite", "--no-append-eos") == 0
    assert any(path.read_bytes() != content for path, content in before.items())


@pytest.mark.parametrize("file", ["made.bin", "made_valid.json"])
def test_other_files_at_the_prefix_are_not_replaced(tmp_path, file):
    (tmp_path / file).write_text("of Megatron-LM's preprocessing")
    source = write(tmp_path, {"prompt": "p", "chosen": "a", "rejected": "b"})
    with pytest.raises(InputError, match=f"{file} is there already"):
        build_dataset([source], "bytes", tmp_path / "made", BuildOptions(holdout=0.5))
    assert not (tmp_path / "made.json").exists()
