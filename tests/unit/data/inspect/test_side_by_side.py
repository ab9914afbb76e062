"""`inspect A B`: several data sets in one table."""

import json

import numpy as np
import pytest
from data_sets import TOKENIZER, inspect, random_tree, write


@pytest.fixture
def prefixes(tmp_path):
    rng = np.random.default_rng(2)
    for name, count, entry in (("a", 3, "v"), ("b", 9, "v"), ("c", 2, "w")):
        tokenizer = {**TOKENIZER, "vocabulary": entry * 64}
        write(tmp_path / name, [random_tree(rng) for _ in range(count)], tokenizer)
    return [tmp_path / name for name in "abc"]


def test_a_column_for_each(prefixes, capsys):
    code, out, _ = inspect(capsys, *prefixes[:2], "--verify")
    assert code == 0
    rows = {line.rsplit(maxsplit=2)[0].strip(): line.split() for line in out.splitlines() if line}
    assert rows["groups"][-2:] == ["3", "9"]
    assert out.splitlines()[2].split() == ["a", "b"]
    assert "25.0 %        75.0 %" in out and "one vocabulary" in out
    assert "all 2 data sets are correct" in out


def test_the_values_are_those_of_each_alone(prefixes, capsys):
    both = json.loads(inspect(capsys, *prefixes[:2], "--json")[1])["statistics"]
    alone = [json.loads(inspect(capsys, p, "--json")[1])["statistics"] for p in prefixes[:2]]
    assert both == alone


def test_other_vocabularies_are_said_and_flags_of_one_are_refused(prefixes, capsys):
    assert "different vocabularies: build them with one" in inspect(capsys, *prefixes)[1]
    code, _, err = inspect(capsys, *prefixes, "--tree", "1")
    assert code == 2 and "--tree is for one data set or plan, and 3 are given" in err
