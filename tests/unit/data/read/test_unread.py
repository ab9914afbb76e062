"""Nothing is lost in silence: what is not read is refused or listed."""

import json
import re

import pytest

from megatron_prefix.__main__ import main
from megatron_prefix.data.read import ExampleReader, parse_columns
from megatron_prefix.errors import InputError


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
TURNS = {"prompt": [user("p")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
DIALOGUES = {"chosen": [user("p"), assistant("a")], "rejected": [user("p"), assistant("b")]}


def unread(record, ignored=(), format="auto"):
    reader = ExampleReader(format, ignored=ignored)
    reader.read(record)
    return reader.unread


@pytest.mark.parametrize("record", [PAIR, TURNS, DIALOGUES])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("question", "Why?"),
        ("input", "Why?"),
        ("system", "Be brief."),
        ("system_prompt", "Be brief."),
        ("context", ["a passage"]),
        ("history", [["q", "r"]]),
        ("messages", [user("another")]),
        ("trajectory", [{"from": "user", "value": "x"}]),
        ("reasoning_content", "because"),
        ("chosen_reasoning", "because"),
        ("rejected_thinking", "because"),
        ("tool_calls", [{"function": {"name": "f"}}]),
        ("functions", [{"name": "f"}]),
        ("userQuery", "Why?"),
        ("document_1", "a text"),
        ("enable_thinking", True),
    ],
)
def test_a_column_that_can_change_the_text_is_refused(record, name, value):
    with pytest.raises(InputError) as error:
        unread({**record, name: value})
    assert f"column {name!r} can change the text" in str(error.value)
    assert f"--ignore-columns {name}" in str(error.value)
    assert unread({**record, name: value}, [name]) == [name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("videos", "'videos' is not supported"),
        ("audio", "'audio' is not supported"),
        ("image_path", "--map images=image_path"),
        ("rejected_images", "--map images=rejected_images"),
        ("img_url", "--map images=img_url"),
    ],
)
def test_pictures_films_and_sounds_elsewhere_are_refused(name, message):
    with pytest.raises(InputError, match=message):
        unread({**PAIR, name: ["x.png"]})
    assert unread({**PAIR, name: "x"}, [name]) == [name]
    assert unread({**PAIR, name: []}) == []


def test_what_else_is_said_of_images_that_were_read_is_listed():
    record = {"question": "Why?", "chosen": "a", "rejected": "b", "image": "x.png"}
    assert unread({**record, "image_path": "x.png", "idx": 1}) == ["image_path", "idx"]
    with pytest.raises(InputError, match="'video' is not supported"):
        unread({**record, "video": "x.mp4"})


@pytest.mark.parametrize("name", ["image", "images"])
def test_images_without_an_image_processor_are_refused(name):
    record = {"question": "Why?", "chosen": "a", "rejected": "b", name: "x.png"}
    with pytest.raises(InputError, match="the record has images, and there is no processor"):
        ExampleReader(no_images="there is no processor").read(record)
    assert unread(record, [name]) == [name]


@pytest.mark.parametrize("value", [None, "", " ", [], {}, False, 0, [""], {"a": None}])
def test_an_empty_column_is_nothing(value):
    assert unread({**PAIR, "system": value, "images": value, "id": value}) == []


def test_what_describes_a_record_is_listed():
    more = {"id": 7, "source": "s", "chosen_model": "m", "labelling_prompt": [user("judge")]}
    assert unread({**PAIR, **more}) == list(more)
    assert unread({**PAIR, "turns": 3, "context": 5}) == ["turns", "context"], "numbers"


def test_a_column_that_repeats_the_conversation_is_listed():
    assert unread({**DIALOGUES, "messages": DIALOGUES["chosen"]}) == ["messages"]
    assert unread({**DIALOGUES, "question": "p"}) == ["question"]
    text = "\n\nHuman: Why?\n\nAssistant:"
    record = {"chosen": f"{text} So.", "rejected": f"{text} No.", "question": "Why?"}
    assert unread(record) == ["question"]
    with pytest.raises(InputError, match="'question'"):
        unread({**record, "question": "Why not?"})


def test_plain_answers_are_no_dialogues_if_there_is_another_text():
    answers = {"chosen": "The sky is blue", "rejected": "The sky is black"}
    assert unread(answers) == []
    assert unread({**answers, "id": "x", "source": "y"}) == ["id", "source"]
    for name in ("sentence", "ask"):
        with pytest.raises(InputError, match=f"--map instruction={name}"):
            unread({**answers, name: "What colour has the sky?"})
    whole = {**answers, "prompt": "The sky"}
    assert unread(whole, format="hh") == ["prompt"], "both begin with it"


def test_fields_of_messages():
    def record(**more):
        return {**TURNS, "chosen": [assistant("a", **more)]}

    assert unread(record(id=3, weight=1)) == ["message.id", "message.weight"]
    with pytest.raises(InputError, match="field 'images' of a message is not supported"):
        unread(record(images=["x.png"]))
    with pytest.raises(InputError, match="field 'context' of a message"):
        unread(record(context="before"))
    assert unread(record(context="x"), ["message.context"]) == ["message.context"]
    with pytest.raises(InputError, match="column 'context'"):
        unread({**record(context="x"), "context": "y"}, ["message.context"])


def test_fields_of_entries():
    def record(**more):
        entries = [{"response": "x", "score": 1, **more}, {"response": "y", "score": 2}]
        return {"instruction": "q", "completions": entries}

    assert unread(record(model="m", custom_system_prompt="s")) == [
        "message.model",
        "message.custom_system_prompt",
    ]
    with pytest.raises(InputError, match="field 'question' of a message or entry"):
        unread(record(question="another"))


def test_reasoning_and_tool_calls_are_passed_on():
    turn = assistant("a", reasoning_content="r", tool_calls=[{"function": {"name": "f", "x": 1}}])
    reader = ExampleReader()
    example = reader.read({**TURNS, "chosen": [turn]})
    assert example.responses[0].response[0].as_dict() == turn and reader.unread == []


def write(tmp_path, *records):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return ["build", "--input", str(path), "--tokenizer", "bytes", "--output", str(tmp_path / "x")]


def test_the_summary_lists_names_and_counts(tmp_path, capsys):
    records = [{**PAIR, "id": 1, "note": "n"}, {**PAIR, "id": 2, "system": "s"}]
    assert main([*write(tmp_path, *records), "--ignore-columns", "system"]) == 0
    out = capsys.readouterr().out
    assert "columns and fields not read  id, note (1 record), system (1 record)" in out
    manifest = json.loads((tmp_path / "x.json").read_text())
    assert manifest["report"]["unread"] == {"id": 2, "note": 1, "system": 1}


def test_a_column_to_ignore_must_exist(tmp_path, capsys):
    assert main([*write(tmp_path, PAIR), "--ignore-columns", "sytem"]) == 2
    assert "--ignore-columns sytem: no record has it" in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()


def test_many_different_names_are_counted_together(tmp_path, capsys):
    records = [{**PAIR, f"n{i}": 1} for i in range(250)]
    assert main(write(tmp_path, *records)) == 0
    assert "(others) (50 records)" in capsys.readouterr().out


def test_correct_the_record_is_said_only_if_others_fit(tmp_path, capsys):
    wrong = {"prompt": "p", "chosen": "a", "rejected": 3}
    for records, expected in (
        ([wrong, PAIR], True),
        ([PAIR, wrong], True),
        ([wrong, wrong], False),
        ([wrong], False),
    ):
        assert main(write(tmp_path, *records)) == 2
        assert ("Correct the record" in capsys.readouterr().err) == expected


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({**PAIR, "system": "s"}, ["s", "p"]),
        ({**PAIR, "system_message": "s"}, ["s", "p"]),
        ({**PAIR, "context": "c"}, ["c\np"]),
        ({"question": "q", "context": "c", "chosen": "a", "rejected": "b"}, ["c\nq"]),
        ({"input": "q", "sys_prompt": "s", "chosen": "a", "rejected": "b"}, ["s", "q"]),
        ({"context": "c", "chosen": "the a", "rejected": "the b"}, ["c"]),
        ({"sentence": "c", "chosen": "the a", "rejected": "the b"}, ["c"]),
    ],
)
def test_the_flags_of_a_remedy_build_the_record(record, expected):
    with pytest.raises(InputError) as error:
        unread(record)
    flags = re.findall(r"--map (\w+=\w+)", str(error.value))
    example = ExampleReader(columns=parse_columns(flags)).read(record)
    assert [turn.content for turn in example.responses[0].prompt] == expected


@pytest.mark.parametrize(
    "record",
    [
        {**TURNS, "context": "c"},
        {**PAIR, "context": ["c"]},
        {**DIALOGUES, "context": "c"},
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}
        | {"context": "c"},
        {"instruction": "q", "context": "c", "chosen": "a", "rejected": "b"},
    ],
)
def test_no_flags_are_advised_that_do_not_help(record):
    with pytest.raises(InputError, match="write its text into the prompt") as error:
        unread(record)
    assert "--map" not in str(error.value)
