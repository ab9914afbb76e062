"""Formats declare what they read, and every record of a sample has one format."""

import json
from pathlib import Path

import pytest

from megatron_prefix.data.read import ExampleReader, Inputs
from megatron_prefix.data.read.formats import FORMATS, Reads, detect_format
from megatron_prefix.data.read.mapping import COLUMNS
from megatron_prefix.data.read.turns import without_json_texts
from megatron_prefix.errors import InputError

SAMPLES = sorted((Path(__file__).resolve().parents[4] / "data" / "formats").glob("*.jsonl"))


def reads_of(path):
    """(format, columns read) of every record of a sample."""
    reader = ExampleReader()
    for record in reader.joined(Inputs([path]).read()):
        value, _ = without_json_texts(record.value)
        format, reads = detect_format(value), Reads(value)
        FORMATS[format].read(reads)
        yield format, reads.reads


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_a_format_reads_only_what_it_declares(path):
    for format, reads in reads_of(path):
        assert reads <= {*FORMATS[format].columns}, format


def test_every_declared_column_is_read_in_a_sample_or_is_another_name():
    """--map takes any declared column, so none may be declared in vain."""
    seen = {name for path in SAMPLES for _, reads in reads_of(path) for name in reads}
    other_names = {
        name
        for format in FORMATS.values()
        for need in format.needs
        for name in need.split("|")
        if "|" in need
    }
    assert {*COLUMNS} - seen - other_names <= {
        *("system_prompt", "ranks", "rewards", "rating", "ratings")
    }


def test_every_format_has_a_sample():
    assert {format for path in SAMPLES for format, _ in reads_of(path)} == FORMATS.keys()


def test_an_unknown_record_names_the_nearest_formats_and_what_they_lack():
    with pytest.raises(InputError) as error:
        detect_format({"prompt": "p", "good": "a", "bad": "b"})
    text = str(error.value)
    assert "no known format has the columns bad, good, prompt" in text
    assert "nearest are the formats ranked (lacks answers) and trl (lacks chosen, rejected)" in text
    assert text.count("lacks") == 2 and "docs/datasets.md" in text


def test_a_wrong_first_record_says_which_format_was_assumed_and_why():
    record = {"prompt": "p", "chosen": "a", "rejected": 3}
    with pytest.raises(InputError) as error:
        ExampleReader().read(record)
    assert "taken for format 'trl' because it has prompt, chosen, rejected" in str(error.value)
    with pytest.raises(InputError) as error:
        ExampleReader("trl").read(record)
    assert "taken for" not in str(error.value)


def test_mapped_columns_decide_the_format():
    """A format that does not read a mapped column is not the one that is meant."""
    record = {"question": "q", "chosen": "a", "rejected": "b", "prompt": "p"}
    assert detect_format(record) == "trl"
    record = {"messages": [], "chosen": "a", "rejected": "b", "instruction": "p"}
    assert detect_format(record) == "messages"
    assert detect_format(record, ["instruction"]) == "alpaca"


def test_every_format_is_on_the_page_of_data_sets():
    docs = SAMPLES[0].parents[3] / "docs"
    for page in ("datasets.md", "data_format.md"):
        text = (docs / page).read_text(encoding="utf-8")
        assert [name for name in FORMATS if f"`{name}`" not in text] == [], page


def test_samples_are_small():
    for path in SAMPLES:
        assert 2 <= len([json.loads(line) for line in path.open(encoding="utf-8")]) <= 8
