"""Prompts that lose their oldest text: turn headers stay, and no more goes than must."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prefix.data.read import Message
from megatron_prefix.data.read.formats import Example, ExampleResponse
from megatron_prefix.data.tokenize import PathEncoder, load_tokenizer, select
from megatron_prefix.data.tokenize.shortening import PromptTurns, has_turns
from megatron_prefix.data.tree import Pair

BYTES = load_tokenizer("bytes")


def message(role, content):
    return Message(role=role, content=content)


def as_text(prompt):
    """(role, content) of every turn."""
    return [(turn.role, turn.content) for turn in prompt]


def test_the_docstrings_example():
    turns = ("system", "S"), ("user", "abc"), ("assistant", "d"), ("user", "ef")
    prompt = PromptTurns(tuple(message(*turn) for turn in turns))
    assert prompt.room == 4
    shortened = {count: as_text(prompt.shortened(count)) for count in range(5)}
    assert shortened[0] == list(turns)
    assert shortened[1] == [turns[0], ("user", "bc"), *turns[2:]]
    assert shortened[3] == [turns[0], turns[3]]
    assert shortened[4] == [turns[0], ("user", "f")]


def test_the_last_exchange_keeps_all_its_turns():
    turns = ("user", "abc"), ("assistant", ""), ("tool", "defg")
    prompt = PromptTurns(tuple(message(*turn) for turn in turns))
    assert prompt.room == 2 + 0 + 3
    assert as_text(prompt.shortened(3)) == [("user", "c"), ("assistant", ""), ("tool", "efg")]
    assert as_text(prompt.shortened(5)) == [("user", "c"), ("assistant", ""), ("tool", "g")]


def test_a_prompt_of_a_system_message_alone_is_not_cut():
    prompt = PromptTurns((message("system", "long " * 9),))
    assert prompt.room == 0 and as_text(prompt.shortened(0)) == [("system", "long " * 9)]


def test_texts_with_turns():
    text = "Rules.\n\nHuman: abc\n\nAssistant: d\n\nHuman: ef\n\nAssistant:"
    assert has_turns(text) and not has_turns("no turns") and not has_turns("\n\nAssistant: x")
    prompt = PromptTurns(text)
    assert prompt.room == 4 and prompt.shortened(0) == text
    assert prompt.shortened(2) == "Rules.\n\nHuman: c\n\nAssistant: d\n\nHuman: ef\n\nAssistant:"
    assert prompt.shortened(4) == "Rules.\n\nHuman: f\n\nAssistant:"


ROLES = st.sampled_from(["system", "user", "assistant", "tool"])
PROMPTS = st.lists(st.tuples(ROLES, st.text("ab \n", max_size=6)), min_size=1, max_size=7)


@settings(max_examples=300, deadline=None)
@given(PROMPTS)
def test_text_only_goes_from_the_front(turns):
    prompt = PromptTurns(tuple(message(*turn) for turn in turns))
    before = len(turns) + sum(len(text) for _, text in turns)
    for count in range(prompt.room + 1):
        left = as_text(prompt.shortened(count))
        size = len(left) + sum(len(text) for _, text in left)
        assert size < before or count == 0
        before = size
        num_front = next((i for i, turn in enumerate(turns) if turn[0] != "system"), len(turns))
        assert left[:num_front] == turns[:num_front]
        own, whole = left[num_front:], turns[len(turns) - len(left) + num_front :]
        assert [role for role, _ in own] == [role for role, _ in whole]
        assert all(b.endswith(a) for (_, a), (_, b) in zip(own, whole, strict=True))
        cut = [a != b for (_, a), (_, b) in zip(own, whole, strict=True)]
        assert sum(cut) <= 1 or len(own) == len(last_exchange(own))


def last_exchange(turns):
    users = [i for i, (role, _) in enumerate(turns) if role == "user"]
    return turns[users[-1] :] if users and users[-1] else turns


def example(prompt, *responses):
    return Example(
        responses=tuple(
            ExampleResponse(prompt=prompt, response=(message("assistant", text),))
            for text in responses
        ),
        pairs=tuple(Pair(chosen=0, rejected=i) for i in range(1, len(responses))),
    )


def chosen(record, max_length):
    encoder = PathEncoder(BYTES)
    paths, _ = encoder.encode(record)
    counted = encoder.num_tokens, vars(encoder.added).copy()
    selection = select(
        record, paths, encoder=encoder, max_length=max_length, overflow="truncate-prompt"
    )
    assert (encoder.num_tokens, vars(encoder.added)) == counted
    return selection, [BYTES.decode(path.tokens.tolist()) for path in selection.paths]


LONG = (
    message("system", "S"),
    message("user", "first question"),
    message("assistant", "first answer"),
    message("user", "second question"),
)


def test_no_more_goes_than_must():
    record = example(LONG, "yes", "never")
    whole = max(len(path.tokens) for path in PathEncoder(BYTES).encode(record)[0])
    for less in range(1, 45):
        selection, texts = chosen(record, whole - less)
        header = re.compile(r"<bos>\n\nSystem: S\n\nHuman: \w*")
        assert all(header.match(text) for text in texts)
        assert [text.split("\n\nAssistant:")[-1] for text in texts] == [" yes<eos>", " never<eos>"]
        prompts = {text.rsplit("\n\nAssistant:", 1)[0] for text in texts}
        assert len(prompts) == 1, "one prompt for the set"
        longest = max(len(path.tokens) for path in selection.paths)
        assert longest <= whole - less
        if less <= 13:  # inside the first turn: a character is a token
            assert longest == whole - less and selection.num_cut == 2
            assert selection.cut_tokens == 2 * less


def test_what_never_fits_does_not_decide_the_cut():
    record = example(LONG, "yes", "no", "n" * 500)
    whole = len(PathEncoder(BYTES).encode(record)[0][0].tokens)
    selection, texts = chosen(record, whole - 3)
    assert len(texts) == 2 and "Human: st question" in texts[0]
    assert selection.dropped == {"over --max-length with the shortest prompt": (1, 1)}


@pytest.mark.parametrize("max_length", [20, 2])
def test_a_prompt_without_room_is_dropped(max_length):
    record = example((message("system", "S" * 30),), "yes", "no")
    selection, texts = chosen(record, max_length)
    assert texts == [] and selection.num_cut == 0
