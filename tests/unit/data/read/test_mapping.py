"""--map moves columns, leads into records, and reaches into lists."""

import pytest

from megatron_prefix.data.read import ExampleReader, parse_columns
from megatron_prefix.data.read.mapping import mapped
from megatron_prefix.errors import InputError


def test_a_whole_column_is_moved():
    record = {"q": "p", "chosen": "a", "rejected": "b"}
    assert mapped(record, {"prompt": "q"}) == (
        {"chosen": "a", "rejected": "b", "prompt": "p"},
        frozenset({"q"}),
    )
    swapped, _ = mapped(record, {"chosen": "rejected", "rejected": "chosen"})
    assert swapped == {"q": "p", "chosen": "b", "rejected": "a"}
    twice, _ = mapped(record, {"prompt": "q", "instruction": "q"})
    assert twice["prompt"] == twice["instruction"] == "p" and "q" not in twice


def test_a_moved_question_is_read_once():
    record = {"system": "s", "input": "Why?", "chosen": "a", "rejected": "b"}
    example = ExampleReader(columns={"instruction": "input"}).read(record)
    assert [m.content for m in example.responses[0].prompt] == ["s", "Why?"]


def test_a_path_marks_its_column_as_read():
    record = {"context": {"q": "p"}, "chosen": "a", "rejected": "b", "id": 1}
    reader = ExampleReader(columns={"prompt": "context.q"})
    assert reader.read(record).responses[0].prompt == "p" and reader.unread == ["id"]
    with pytest.raises(InputError, match="'context' can change the text"):
        ExampleReader(columns={"prompt": "id"}).read({**record, "id": "x"})


def test_lists_of_entries():
    record = {"prompt": "q", "answers": [{"text": "x", "stars": 1}, {"text": "y", "stars": 3}]}
    flags = ["instruction=prompt", "completions[].response=answers[].text"]
    columns = parse_columns([*flags, "completions[].score=answers[].stars"])
    reader = ExampleReader(columns=columns)
    example = reader.read(record)
    assert reader.format == "ultrafeedback" and reader.unread == []
    assert [(r.response[0].content, r.score) for r in example.responses] == [("x", 1), ("y", 3)]


def test_lists_of_texts_and_deeper_ones():
    record = {"a": {"texts": ["x", "y"]}, "marks": [1, 2]}
    columns = {"answers[].answer": "a.texts[]", "answers[].score": "marks[]"}
    expected = [{"answer": "x", "score": 1}, {"answer": "y", "score": 2}]
    assert mapped(record, columns)[0]["answers"] == expected
    with pytest.raises(InputError, match="there are 1 entries, but 2 of the path before"):
        mapped({**record, "marks": [1]}, columns)
    with pytest.raises(InputError, match="'marks' is a number, not a list"):
        mapped({**record, "marks": 1}, columns)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("completions[].response=answers", "both sides need one"),
        ("chosen=answers[].text", "both sides need one"),
        ("completions[].response=a[].b[].c", "both sides need one"),
        ("completions[].colour=a[].b", "no format reads a field 'colour'"),
        ("colour[].response=a[].b", "no format reads a column 'colour'"),
    ],
)
def test_targets_and_paths_that_cannot_be(text, message):
    with pytest.raises(InputError, match=message):
        parse_columns([text])


def test_a_side_that_is_chosen_by_map_must_not_hide_the_label():
    record = {"prompt": "p", "a": "x", "b": "y", "winner": "b"}
    columns = {"chosen": "a", "rejected": "b"}
    with pytest.raises(InputError, match="column 'winner' names the better response"):
        ExampleReader(columns=columns).read(record)
    reader = ExampleReader(columns=columns, ignored=["winner"])
    assert reader.read(record).responses[0].response == "x"
    plain = {"prompt": "p", "chosen": "x", "rejected": "y", "winner": "b"}
    ExampleReader().read(plain)
