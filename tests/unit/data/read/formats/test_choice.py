"""Two responses and a label: sides, signs, winners, ties; and the formats beside them."""

import json

import pytest

from megatron_prefix.data.read import ExampleReader
from megatron_prefix.data.read.formats import DegenerateRecord
from megatron_prefix.errors import InputError


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def plain(text):
    return text if isinstance(text, str) else [(m.role, m.content) for m in text]


def read(record, format="auto"):
    """(prompt, chosen, rejected) of a record with one pair."""
    example = ExampleReader(format).read(record)
    (pair,) = example.pairs
    chosen, rejected = example.responses[pair.chosen], example.responses[pair.rejected]
    assert (pair.chosen, pair.rejected) == (0, 1) and chosen.prompt == rejected.prompt
    return plain(chosen.prompt), plain(chosen.response), plain(rejected.response)


GOOD, BAD = [("assistant", "good")], [("assistant", "bad")]
ASKED = [("user", "q")]


@pytest.mark.parametrize(
    ("names", "label", "value"),
    [
        (("response_0", "response_1"), "better_response_id", 1),
        (("response_0", "response_1"), "better_response_id", 1.0),
        (("response_1", "response_2"), "preference", 2),
        (("response1", "response2"), "choice", "response2"),
        (("response_a", "response_b"), "winner", "B"),
        (("response_a", "response_b"), "winner", "model_b"),
        (("response_A", "response_B"), "preferred", "B"),
        (("answer_0", "answer_1"), "label", 1),
        (("response_1", "response_2"), "winner", "model_b"),
        (("output_1", "output_2"), "preference", "2"),
        (("completion_a", "completion_b"), "better", "completion_b"),
        (("response1", "response2"), "overall_preference", 1),
        (("response_1", "response_2"), "preference_strength", 3),
    ],
)
def test_the_second_response_is_better(names, label, value):
    first, second = names
    record = {"prompt": "q", first: "bad", second: "good", label: value}
    assert read(record) == (ASKED, GOOD, BAD)


@pytest.mark.parametrize(
    ("names", "label", "value"),
    [
        (("response_0", "response_1"), "better_response_id", 0),
        (("response_1", "response_2"), "preference", 1),
        (("response_a", "response_b"), "winner", "a"),
        (("response1", "response2"), "overall_preference", -3),
    ],
)
def test_the_first_response_is_better(names, label, value):
    first, second = names
    record = {"question": "q", first: "good", second: "bad", label: value}
    assert read(record) == (ASKED, GOOD, BAD)


@pytest.mark.parametrize(
    ("label", "value"),
    [
        ("overall_preference", 0),
        ("winner", "tie"),
        ("winner", "tie (bothbad)"),
        ("preferred", "Both"),
        ("choice", "neither"),
    ],
)
def test_a_tie_is_no_pair(label, value):
    record = {"prompt": "q", "response_a": "x", "response_b": "y", label: value}
    with pytest.raises(DegenerateRecord, match="tie"):
        read(record)


@pytest.mark.parametrize("value", [2, "model_c", "", 0.5, True, [1], -1])
def test_a_label_that_names_no_side_is_wrong(value):
    record = {"prompt": "q", "response_0": "x", "response_1": "y", "better_response_id": value}
    with pytest.raises(InputError, match="names neither response_0 nor response_1"):
        read(record)


def test_prompts_of_choices():
    sides = {"response_1": "good", "response_2": "bad", "preference": 1}
    turns = [user("a"), assistant("b"), user("q")]
    expected = [("user", "a"), ("assistant", "b"), ("user", "q")]
    assert read({"context": turns, **sides})[0] == expected
    steerlm = "a\n<extra_id_1>Assistant\nb\n<extra_id_1>User\nq"
    assert read({"prompt": steerlm, **sides})[0] == expected
    assert read({"prompt": steerlm + "\n<extra_id_1>Assistant\n", **sides})[0] == expected
    assert read({"instruction": "q", "input": "x", **sides})[0] == [("user", "q\nx")]
    with_system = {"system": "s", "prompt": "q", **sides}
    assert read(with_system)[0] == [("system", "s"), ("user", "q")]
    dialogue = "\n\nHuman: q\n\nAssistant:"
    assert read({"prompt": dialogue, **sides}) == (dialogue, "good", "bad")
    with pytest.raises(InputError, match="'system' is a system message, but the prompt is a whole"):
        read({"system": "s", "prompt": dialogue, **sides})


def test_arena_conversations_and_votes():
    a, b = ([user("q"), assistant(text)] for text in ("bad", "good"))
    record = {"conversation_a": a, "conversation_b": b, "winner": "model_b"}
    assert read(record) == (ASKED, GOOD, BAD)
    votes = {"winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0}
    texts = {"response_a": json.dumps(["x", "bad"]), "response_b": ["x", "good"]}
    record = {"prompt": json.dumps(["p", "q"]), **texts}
    expected = [("user", "p"), ("assistant", "x"), ("user", "q")]
    assert read({**record, **votes}) == (expected, GOOD, BAD)
    silent = {**record, "response_a": json.dumps(["x", None])}
    assert read({**silent, **votes}) == (expected, GOOD, [("assistant", "")])
    tie = {"winner_model_a": 0, "winner_model_b": 0, "winner_tie": 1}
    with pytest.raises(DegenerateRecord, match="tie"):
        read({**record, **tie})
    with pytest.raises(InputError, match="one must be 1 and the others 0"):
        read({**record, **votes, "winner_model_a": 1})
    with pytest.raises(InputError, match="'response_b' has 1 turn, but 'prompt' has 2"):
        read({**record, **votes, "response_b": ["x"]})


def test_webgpt_scores_decide():
    record = {"question": {"full_text": "q"}, "answer_0": "bad", "answer_1": "good"}
    example = ExampleReader().read({**record, "score_0": -0.5, "score_1": 0.5})
    assert [r.score for r in example.responses] == [0.5, -0.5]
    assert plain(example.responses[0].response) == GOOD
    for scores in ({"score_0": 0, "score_1": 0}, {"score_0": 0.0, "score_1": -0.0}):
        with pytest.raises(DegenerateRecord, match="tie"):
            read({**record, **scores})


def test_shp_labels_name_comment_a():
    record = {"history": "q", "human_ref_A": "good", "human_ref_B": "bad", "labels": 1}
    assert read({**record, "score_A": 9, "score_B": 2}) == (ASKED, GOOD, BAD)
    swapped = {**record, "human_ref_A": "bad", "human_ref_B": "good", "labels": 0}
    assert read(swapped) == (ASKED, GOOD, BAD)
    with pytest.raises(InputError, match="'labels' is a number, it must be 1 or 0"):
        read({**record, "labels": 2})


def test_summaries_of_posts_and_articles():
    texts = [{"text": " bad"}, {"text": " good"}]
    post = {"post": "p", "title": "t", "subreddit": "s"}
    record = {"info": post, "summaries": texts, "choice": 1}
    assert read(record) == ("SUBREDDIT: r/s\n\nTITLE: t\n\nPOST: p\n\nTL;DR:", " good", " bad")
    article = {"article": "a", "title": "t", "post": None}
    assert read({**record, "info": article})[0] == "TITLE: t\n\nARTICLE: a\n\nTL;DR:"
    for wrong in ({"choice": 2}, {"summaries": texts[:1]}, {"info": {"title": "t"}}):
        with pytest.raises(InputError, match="choice must be 0 or 1|neither 'post' nor 'article'"):
            read({**record, **wrong})
