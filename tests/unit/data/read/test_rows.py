"""Rows of messages and of responses become records."""

import json

import pytest

from megatron_prefix.__main__ import main
from megatron_prefix.data.read import ExampleReader, Inputs
from megatron_prefix.data.store import PreferenceDataset


def message(id, parent, text, role="assistant", **more):
    return {"message_id": id, "parent_id": parent, "text": text, "role": role, **more}


TREE = [
    message("a", None, "q", "prompter"),
    message("b", "a", "x", rank=0.0),
    message("c", "a", "y", rank=1),
    message("d", "b", "r", "prompter"),
    message("e", "d", "z", rank=1),
    message("f", "d", "w", rank=0),
]
RESPONSES = [
    {"prompt": "q", "response": "x", "helpfulness": 3},
    {"prompt": "q", "response": "y", "helpfulness": 1},
    {"prompt": "r", "response": "z", "helpfulness": 0},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def joined(tmp_path, rows, **reader):
    path = write(tmp_path / "in.jsonl", rows)
    return list(ExampleReader(**reader).joined(Inputs([path]).scan()))


def build(tmp_path, rows, *flags):
    path, prefix = write(tmp_path / "in.jsonl", rows), tmp_path / "set"
    flags = ["--input", str(path), "--tokenizer", "bytes", "--output", str(prefix), *flags]
    return main(["build", *flags]), prefix


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [5, 3, 2, 4, 1, 0], [1, 4, 0, 5, 2, 3]])
def test_a_tree_in_any_order(tmp_path, order):
    (record,) = joined(tmp_path, [TREE[i] for i in order])
    example = ExampleReader().read(record.value, record.is_joined)
    texts = [r.response[0].content for r in example.responses]
    pairs = sorted((texts[p.chosen], texts[p.rejected]) for p in example.pairs)
    assert pairs == [("w", "z"), ("x", "y")] and record.rows == 6


def test_trees_in_the_order_of_their_first_messages(tmp_path):
    other = [
        message(
            f"2{row['message_id']}",
            row["parent_id"] and f"2{row['parent_id']}",
            row["text"],
            row["role"],
        )
        for row in TREE
    ]
    rows = [TREE[1], other[0], TREE[0], *other[1:], *TREE[2:]]
    records = joined(tmp_path, rows)
    assert [(r.number, r.value["prompt"]["message_id"]) for r in records] == [(0, "2a"), (1, "a")]
    assert [record.line for record in records] == [2, 3]


def test_messages_without_a_place_are_errors_with_their_line(tmp_path, capsys):
    rows = [*TREE, message("g", "nowhere", "x"), TREE[1], message(None, "a", "x")]
    wrong = [(r.line, r.error) for r in joined(tmp_path, rows) if r.error]
    assert wrong == [
        (8, "'message_id' occurs twice"),
        (9, "'message_id' is null, it must be text"),
        (7, "the message's parent 'nowhere' is not among the rows"),
    ]
    assert build(tmp_path, rows)[0] == 2
    assert "in.jsonl, line 8: 'message_id' occurs twice" in capsys.readouterr().err
    code, prefix = build(tmp_path, rows, "--on-error", "skip")
    assert code == 0 and len(PreferenceDataset(prefix)) == 1
    assert "joined from 9 rows" in capsys.readouterr().out


def test_responses_to_one_prompt_are_one_record(tmp_path, capsys):
    records = joined(tmp_path, RESPONSES)
    assert [(record.rows, record.line) for record in records] == [(2, 1), (1, 3)]
    code, prefix = build(tmp_path, RESPONSES)
    assert code == 0 and len(PreferenceDataset(prefix)) == 1
    out = capsys.readouterr().out
    assert "records read  2, joined from 3 rows" in out and "no pair" in out


def test_columns_of_rows_can_be_renamed_and_left_out(tmp_path, capsys):
    rows = [
        {
            "question": r["prompt"],
            "response": r["response"],
            "score": r["helpfulness"],
            "system": "s",
        }
        for r in RESPONSES
    ]
    code, _ = build(tmp_path, rows, "--map", "prompt=question")
    assert code == 2 and "'system' of a message or entry" in capsys.readouterr().err
    flags = ["--map", "prompt=question", "--ignore-columns", "system"]
    code, prefix = build(tmp_path, rows, *flags)
    assert code == 0 and PreferenceDataset(prefix).manifest["report"]["format"] == "ranked"


def test_records_that_are_no_rows_pass_unchanged(tmp_path):
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b", "response": "a", "score": 1}]
    (record,) = joined(tmp_path, rows)
    assert not record.is_joined and record.decoded().value == rows[0]


def test_workers_do_not_change_the_files(tmp_path):
    rows = [message("a", None, "q", "prompter")]
    for i in range(200):
        rows += [
            message(f"p{i}", None, f"q{i}", "prompter"),
            message(f"x{i}", f"p{i}", "x", rank=0),
        ]
        rows.append(message(f"y{i}", f"p{i}", "y", rank=1))
    fingerprints = {
        PreferenceDataset(build(tmp_path, rows, "--workers", n)[1]).fingerprint for n in "12"
    }
    assert len(fingerprints) == 1
