"""The experiments' scripts: their data, two steps of one curve, a fold of rankings, their tables
and plots."""

from __future__ import annotations

import gzip
import json
import sys

import pytest
from toy import ROOT

sys.path.insert(0, str(ROOT / "examples" / "experiments"))

import one_curve  # noqa: E402
import rankings  # noqa: E402
import several_references  # noqa: E402


def test_letters_have_the_share_of_wrong_labels():
    def friendly(text: str) -> int:
        return sum(word.strip(" .,") in several_references.NICE for word in text.split())

    records = several_references.letters(0, 400, 0.2)
    wrong = [friendly(x["chosen"]) < friendly(x["rejected"]) for x in records]
    assert 0.1 < sum(wrong) / len(wrong) < 0.3
    assert len({x["prompt"] for x in records}) == 400


def test_the_table_has_a_row_per_method():
    alone = {"policy": 0.7, "reward": 0.6, "weights": [1.0]}
    mixed = {"policy": 0.8, "reward": 0.5, "weights": [0.25, 0.75]}
    results = [{"one reference / a": alone, "geometric / uniform": mixed}]
    lines = several_references.table(results, [{"a": 0.4, "b": 0.9}]).splitlines()
    assert lines[2].startswith("| geometric / uniform |  | 80.0 (80.0–80.0) |")
    assert "0.25 0.75" in lines[2] and "| 40.0 (40.0–40.0) |" in lines[3]


def test_one_curve(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(one_curve, "STEPS", 2)
    monkeypatch.setattr(one_curve, "OBJECTIVES", {"sigmoid": {}, "ipo": {"loss_type": "ipo"}})
    monkeypatch.setattr(sys, "argv", ["one_curve", "--output", str(tmp_path), "--seeds", "1"])
    one_curve.main()
    rows = capsys.readouterr().out.splitlines()
    assert float(rows[-3].split("|")[3]) < 1e-5 and rows[-3].startswith("| ipo |")
    assert (tmp_path / "one_curve.png").stat().st_size > 1000


def write_trees(path, count: int) -> None:
    """Prompts with three ranked answers: a letter repeated, of which more is better."""
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for number in range(count):
            answers = [
                {"text": "so " * (4 - rank) + "it is", "role": "assistant", "rank": rank}
                for rank in range(3)
            ]
            prompt = {"text": f"Is it {number}?", "role": "prompter", "replies": answers}
            record = {"message_tree_id": str(number), "tree_state": "ready_for_export"}
            file.write(json.dumps({**record, "prompt": prompt}) + "\n")


def test_rankings(tmp_path, monkeypatch, capsys):
    """Two folds of three steps with two methods: the table, and what the plot is drawn of."""
    names = ("Plackett-Luce, one pass", "all pairs, unshared")
    monkeypatch.setattr(rankings, "METHODS", {x: rankings.METHODS[x] for x in names})
    monkeypatch.setattr(rankings, "FOLDS", 2)
    monkeypatch.setattr(rankings, "EPOCHS", 1)
    monkeypatch.setattr(rankings, "BATCH", 1)
    write_trees(tmp_path / "trees.jsonl.gz", 6)
    files = ["--input", str(tmp_path / "trees.jsonl.gz"), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["rankings", *files])
    rankings.main()
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if "|" in line]
    assert [row[1].strip() for row in rows[2:]] == [*names]
    assert 0.2 < float(rows[2][2].split("(")[0]) < 0.6 and float(rows[3][2].split("(")[0]) == 1
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert report["longer"] == 2 * 3 * 3, "of three answers the better one of each pair is longer"
    runs = [fold[name] for fold in report["results"] for name in names]
    assert all(len(run["correct"]) == 1 and run["pairs"] == 9 for run in runs)
    assert all(run["seconds"] > 0 for run in runs)
    assert (tmp_path / "out" / "rankings.png").stat().st_size > 1000


def test_rankings_judge_all_methods_alike():
    """Accuracies are of all folds' pairs together, not means over folds."""
    runs = [{"x": {"pairs": 30, "correct": [15.0, 30.0]}}, {"x": {"pairs": 10, "correct": [5, 0]}}]
    assert rankings.accuracies(runs, "x") == pytest.approx([0.5, 0.75])
