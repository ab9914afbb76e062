"""Conversations in all their layouts become the same messages."""

import json

import pytest

from megatron_prefix.data.read import ExampleReader
from megatron_prefix.data.read.turns import turns, without_json_texts
from megatron_prefix.errors import InputError

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


def plain(messages):
    return [message.as_dict() for message in messages]


@pytest.mark.parametrize(
    "value",
    [
        TURNS,
        SHAREGPT,
        [TURNS[0], SHAREGPT[1]],
        {"role": ["user", "assistant"], "content": ["q", "a"]},
        {"from": ["human", "gpt"], "value": ["q", "a"]},
        [{"role": "human", "content": "q"}, {"role": "gpt", "content": "a"}],
        [{"role": "user", "content": [{"type": "text", "text": "q"}]}, TURNS[1]],
        [{"role": "user", "content": ["q"]}, TURNS[1]],
        [{**TURNS[0], "name": None}, {**TURNS[1], "tool_calls": []}],
    ],
)
def test_layouts(value):
    assert plain(turns(value, "x")) == TURNS


def test_one_message_is_a_conversation():
    assert plain(turns(TURNS[1], "x")) == TURNS[1:]
    assert plain(turns({"from": "gpt", "value": "a"}, "x")) == TURNS[1:]


def test_other_roles_are_left_to_the_template():
    value = [{"role": "developer", "content": "d"}]
    assert plain(turns(value, "x")) == value
    with pytest.raises(InputError, match="'from' is 'developer', not one of system"):
        turns([{"from": "developer", "value": "d"}], "x")


def test_calls_and_answers_of_tools():
    call = json.dumps({"name": "f", "arguments": {"a": 1}})
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]
    expected = [{"role": "assistant", "content": "", "tool_calls": calls}]
    expected.append({"role": "tool", "content": "r"})
    for called, answered in (("tool_call", "tool_response"), ("function_call", "observation")):
        roles = [{"role": called, "content": call}, {"role": answered, "content": "r"}]
        assert plain(turns(roles, "x")) == expected
        roles = [{"from": called, "value": call}, {"from": answered, "value": "r"}]
        assert plain(turns(roles, "x")) == expected


def test_calls_join_the_assistants_message_before_them():
    call = {"role": "tool_call", "content": json.dumps({"name": "f", "arguments": {}})}
    joined = plain(turns([TURNS[0], TURNS[1], call, call], "x"))
    assert len(joined) == 2 and joined[1]["content"] == "a"
    assert [c["function"]["name"] for c in joined[1]["tool_calls"]] == ["f", "f"]


def test_older_function_calls():
    turn = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    (message,) = plain(turns([turn], "x"))
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}
    text = {"role": "assistant", "content": "", "tool_calls": json.dumps(message["tool_calls"])}
    assert plain(turns([text], "x")) == [message]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("q", "x is text, it must be a list"),
        (["q"], "message 1 is text, it must be an object"),
        ([{"role": "user"}], "message 1: 'content' is null"),
        ([{"content": "q"}], "message 1: 'role' is null"),
        ([{"role": "user", "content": 3}], "'content' is a number"),
        ([{"role": "tool_call", "content": "f"}], "the function call is not JSON"),
        ([{"role": "tool_call", "content": "{}"}], "needs 'name' and 'arguments'"),
        ([{**TURNS[1], "tool_calls": {}}, {**TURNS[1], "tool_calls": {"a": 1}}], "message 2: 't"),
        ([{"role": "user", "content": [{"type": "image"}]}], "not text but 'image'"),
        ([{"role": "user", "content": [{"type": "image_url", "text": "x"}]}], "but 'image_url'"),
        ({"role": ["user", "assistant"], "content": ["q"]}, "lengths are"),
        ({"role": ["user"], "content": "q"}, "object of lists"),
    ],
)
def test_wrong_conversations(value, message):
    with pytest.raises(InputError, match=message):
        turns(value, "x")


def test_json_texts_of_conversations():
    record = {"prompt": json.dumps(TURNS[:1]), "chosen": "a", "rejected": "b"}
    assert without_json_texts(record) == ({**record, "prompt": TURNS[:1]}, True)
    sides = {"chosen": json.dumps(TURNS), "rejected": json.dumps(TURNS[:1])}
    assert without_json_texts(sides) == ({"chosen": TURNS, "rejected": TURNS[:1]}, True)
    answer = {**sides, "prompt": "Write messages as JSON.", "rejected": "I cannot."}
    assert without_json_texts(answer) == (answer, False), "a response may be JSON"
    for other in ('[{"a": 1}]', "[", "[]", '{"role": "user"}'):
        assert without_json_texts({"prompt": other})[1] is False
    example = ExampleReader().read(
        {
            "prompt": json.dumps(TURNS[:1]),
            **{name: json.dumps([{"role": "assistant", "content": name}]) for name in sides},
        }
    )
    assert example.responses[1].response[0].content == "rejected"
    assert [note for note in example.notes if "JSON texts" in note]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": TURNS, "rejected_response": ["a", "\ud800"]},
        {"messages": TURNS, "rejected_response": [{"role": "assistant", "content": "\ud800"}]},
        {"prompt": ["q"], "response_a": ["\ud800"], "response_b": ["b"], "winner_model_a": 1}
        | {"winner_model_b": 0, "winner_tie": 0},
        {"prompt": "q", "responses": ["\ud800", "b"], "scores": [1, 2]},
        {"prompt": "\ud800", "response_0": "a", "response_1": "b", "winner": 0},
        {"info": {"post": "\ud800"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 0},
        {"instruction": "q", "history": [["\ud800", "b"]], "chosen": "a", "rejected": "b"},
    ],
)
def test_half_a_character_is_refused_wherever_it_is(record):
    with pytest.raises(InputError, match="half of a surrogate pair"):
        ExampleReader().read(record)


@pytest.mark.parametrize("history", [True, 3, "text", {"a": 1}, [["q"]], ["q"]])
def test_a_history_of_another_form_is_refused(history):
    record = {"instruction": "q", "history": history, "chosen": "a", "rejected": "b"}
    with pytest.raises(InputError, match="history"):
        ExampleReader().read(record)
