"""What chat templates leave out: counted by kind, and an error if nothing of a response is left."""

import json

import pytest

from megatron_prefix.data.read import Message
from megatron_prefix.data.tokenize.rendering import (
    NOTE_CALLS,
    NOTE_OLD_REASONING,
    NOTE_REASONING,
    check_written,
    extra_changes,
)
from megatron_prefix.errors import InputError


def assistant(content, **more):
    return Message(role="assistant", content=content, extra=json.dumps(more) if more else "")


CALL = {"type": "function", "function": {"name": "depth", "arguments": {}}}


def test_left_out_calls_and_reasoning_are_noted_once():
    turns = [
        assistant("a", reasoning_content="first thought"),
        assistant("b", thinking="second thought"),
        assistant("", tool_calls=[CALL, CALL]),
    ]
    whole = "first thought a second thought b depth"
    assert extra_changes(turns, 1, whole) == []
    assert extra_changes(turns, 1, "a second thought b depth") == [NOTE_OLD_REASONING]
    assert extra_changes(turns, 1, "first thought a b depth") == [NOTE_REASONING]
    assert extra_changes(turns, 1, "first thought a second thought b") == [NOTE_CALLS]
    assert extra_changes(turns, 1, "a b") == [NOTE_OLD_REASONING, NOTE_REASONING, NOTE_CALLS]


@pytest.mark.parametrize(
    "call", ["text", {"name": "depth"}, {"function": "depth"}, {"function": {}}, 3, None]
)
def test_calls_of_any_form_do_not_stop(call):
    turns = [assistant("", tool_calls=[call])]
    assert extra_changes(turns, 0, "depth") == []
    check_written(turns, "depth")


def test_a_response_of_which_nothing_is_written_is_an_error():
    lost = [
        ([assistant("", tool_calls=[CALL])], "it leaves out its tool calls"),
        ([assistant("", reasoning_content="because")], "it leaves out its reasoning"),
        ([assistant("yes", tool_calls=[CALL])], "it leaves out its text and its tool calls"),
    ]
    for response, message in lost:
        with pytest.raises(InputError, match=message):
            check_written(response, "<|im_end|>\n")
    check_written([assistant("yes", tool_calls=[CALL])], "yes<|im_end|>")
    check_written([assistant("Yes")], "YES")
    check_written([assistant("")], "<|im_end|>")
    check_written([assistant("?!")], "<|im_end|>")
