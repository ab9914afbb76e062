"""The experiments' scripts: their data, two steps of one curve, their tables and plots."""

from __future__ import annotations

import sys

from toy import ROOT

sys.path.insert(0, str(ROOT / "examples" / "experiments"))

import one_curve  # noqa: E402
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
