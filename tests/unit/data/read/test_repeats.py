"""Responses that begin with their own prompt are noted."""

import pytest

from megatron_prefix.data.read import ExampleReader


def count(record, format="auto"):
    notes = ExampleReader(format).read(record).notes
    return sum("begin with their whole prompt" in note for note in notes)


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [("2 + 2 = 4", "2 + 2 = 5", 2), ("2 + 2 = 4", "5", 1), ("4", "5", 0), ("2 + 2 =", "5", 0)],
)
def test_plain_texts(chosen, rejected, expected):
    assert count({"prompt": "2 + 2 = ", "chosen": chosen, "rejected": rejected}) == expected


def test_messages():
    def record(question):
        return {
            "prompt": [{"role": "user", "content": question}],
            "chosen": [{"role": "assistant", "content": f"{question} Yes."}],
            "rejected": [{"role": "assistant", "content": "No."}],
        }

    assert count(record("Is it true?")) == 1
    assert count(record("Good morning")) == 0, "a greeting is answered with the same words"


def test_whole_texts_are_read_as_such():
    record = {"prompt": "2 + 2 =", "chosen": "2 + 2 = 4", "rejected": "2 + 2 = 5"}
    assert count(record, "hh") == 0
    example = ExampleReader("hh").read(record)
    assert [(r.prompt, r.response) for r in example.responses] == [
        ("2 + 2 =", " 4"),
        ("2 + 2 =", " 5"),
    ]
