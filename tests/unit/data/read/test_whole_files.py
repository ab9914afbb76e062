"""Files that are one value: read, or refused with the command that makes them readable."""

import json

import pytest

from megatron_prefix.data.read import Inputs
from megatron_prefix.errors import InputError

A, B = ({"prompt": "p", "chosen": c, "rejected": "x"} for c in "ab")


def items(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [(r.line, r.value, r.error) for r in Inputs([path]).read()]


def test_records_over_several_lines(tmp_path):
    pretty = json.dumps(A, indent=1)
    assert items(tmp_path / "one", pretty) == [(1, A, None)]
    assert items(tmp_path / "two", f"\n{pretty}\n{json.dumps(B, indent=2)}\n") == [
        (2, A, None),
        (7, B, None),
    ]
    broken = f"{pretty}\n{{\n 'prompt'"
    assert items(tmp_path / "three", broken)[0] == (1, A, None)
    line, value, error = items(tmp_path / "three", broken)[1]
    assert (line, value) == (7, None) and "not JSON" in error
    line, _, error = items(tmp_path / "four", f"\n{pretty}\n".encode() + b'{"a":\n"\xe9"}')[0]
    assert line == 8 and "not UTF-8" in error


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("name", ["data", "rows", "examples", "train"])
def test_records_inside_an_object(tmp_path, name, indent):
    content = json.dumps({"version": 1, "info": {"a": 2}, name: [A, B]}, indent=indent)
    assert [value for _, value, _ in items(tmp_path / "in", content)] == [A, B]


def test_what_else_has_a_list_of_objects(tmp_path):
    record = {**A, "examples": [{"a": 1}]}
    assert items(tmp_path / "in", json.dumps(record)) == [(1, record, None)]
    assert len(items(tmp_path / "in", json.dumps({"data": [A]}) + "\n" + json.dumps(B))) == 2
    splits = json.dumps({"train": [A], "test": [B]})
    assert "with the lists train, test" in items(tmp_path / "in", splits)[0][2]


@pytest.mark.parametrize(
    "value",
    [
        {"prompt": {"0": "p", "1": "q"}, "chosen": {"0": "a", "1": "b"}},
        {"columns": ["prompt"], "index": [0], "data": [["p"]]},
        {"prompt": ["p", "q"], "chosen": ["a", "b"], "rejected": ["c", "d"]},
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_columns_name_the_command(tmp_path, value, indent):
    ((line, record, error),) = items(tmp_path / "in", json.dumps(value, indent=indent))
    assert (line, record) == (1, None)
    assert "to_json(path, orient='records', lines=True)" in error


@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x"])
def test_csv_names_the_command_that_works(tmp_path, name):
    import subprocess
    import sys

    path = tmp_path / name
    mark = "\t" if name == "x.tsv" else ","
    lines = [f"prompt{mark}chosen{mark}rejected", f"p{mark}a{mark}x", f"q{mark}b{mark}y"]
    ((_, value, error),) = items(path, "\n".join(lines))
    assert value is None and "CSV" in error
    script = error.partition('python -c "')[2].rpartition('"')[0]
    subprocess.run([sys.executable, "-c", script], check=True)
    (made,) = tmp_path.glob("*.jsonl")
    assert [r.value["chosen"] for r in Inputs([made]).read()] == ["a", "b"]


def test_a_directory_with_csv_names_the_command(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.csv").write_text("prompt,chosen,rejected\nNA,a,b\n")
    with pytest.raises(InputError, match=r"a\.csv: the file looks like CSV.*a\.jsonl"):
        Inputs([tmp_path]).check()


def test_a_first_line_that_is_no_header_is_just_not_json(tmp_path):
    for text in ("a text, with a comma. And more!", "prompt", "1,2"):
        assert "CSV" not in items(tmp_path / "in", text)[0][2]


def test_arrow_files_and_streams(tmp_path):
    import pyarrow

    table = pyarrow.Table.from_pylist([{**A, "margin": 2.0}, B])
    for kind in (pyarrow.ipc.new_file, pyarrow.ipc.new_stream):
        path = tmp_path / kind.__name__
        with pyarrow.OSFile(str(path), "wb") as sink, kind(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=1)
        records = list(Inputs([path]).read())
        assert [r.value for r in records] == [{**A, "margin": 2.0}, B]
        assert records[1].place == f"{path}, row 2"
        path.write_bytes(path.read_bytes()[:300])
        assert "damaged or cut off" in list(Inputs([path]).read())[-1].error
        with pyarrow.OSFile(str(path), "wb") as sink, kind(sink, table.schema):
            pass
        assert "contains no row" in list(Inputs([path]).read())[-1].error


def test_a_directory_of_shards(tmp_path):
    import pyarrow

    plain, packed = tmp_path / "plain", tmp_path / "packed"
    for folder in (plain, packed):
        folder.mkdir()
    for i, record in enumerate((A, B)):
        line = (json.dumps(record) + "\n").encode()
        (plain / f"part-0000{i}").write_bytes(line)
        data = pyarrow.Codec("zstd").compress(line).to_pybytes()
        (packed / f"{i}.jsonl.zst").write_bytes(data)
    (plain / "_SUCCESS").touch()
    (plain / "README.md").write_text("About the data.")
    for folder in (plain, packed):
        inputs = Inputs([folder])
        inputs.check()
        records = list(inputs.read())
        assert [r.value for r in records] == [A, B] and inputs.num_bytes > 0
        assert [r.number for r in records] == [0, 1] and records[1].path.parent == folder


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (b"PK\x03\x04", "zip"),
        (b"BZh9", "bzip2 -d"),
        (b"\xfd7zXZ\0", "xz -d"),
        (b"\x80\x04", "pickle"),
    ],
)
def test_other_kinds_are_named(tmp_path, start, kind):
    path = tmp_path / "in"
    path.write_bytes(start + b"....")
    with pytest.raises(InputError, match=kind):
        Inputs([path]).check()
