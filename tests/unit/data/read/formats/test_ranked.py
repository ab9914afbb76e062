"""Several answers with ranks or scores, under all their names."""

import pytest

from megatron_prefix.data.read import ExampleReader
from megatron_prefix.errors import InputError


def outline(record):
    """Of an example: [(response, rank, score)], sorted pairs of responses."""
    example = ExampleReader().read(record)
    texts = [
        r.response if isinstance(r.response, str) else r.response[0].content
        for r in example.responses
    ]
    entries = [(t, r.rank, r.score) for t, r in zip(texts, example.responses, strict=True)]
    return entries, sorted((texts[p.chosen], texts[p.rejected]) for p in example.pairs)


def test_float_ranks_of_seven_answers():
    answers = [{"answer": str(i), "rank": float(7 - i), "model": "m"} for i in range(7)]
    entries, pairs = outline({"prompt": "\n\nHuman: q\n\nAssistant: ", "answers": answers})
    assert [rank for _, rank, _ in entries] == [7, 6, 5, 4, 3, 2, 1]
    assert len(pairs) == 21 and ("6", "0") in pairs and ("0", "6") not in pairs
    with pytest.raises(InputError, match="entry 1: 'rank' is 0.5"):
        outline({"prompt": "q", "answers": [{"answer": "a", "rank": 0.5}]})


@pytest.mark.parametrize(
    "record",
    [
        {"responses": [{"response": "x", "score": 1}, {"response": "y", "score": 3}]},
        {"completions": [{"completion": "x", "reward": 1}, {"completion": "y", "reward": 3}]},
        {"candidates": [{"text": "x", "rating": 1}, {"text": "y", "rating": 3}]},
        {"generations": ["x", "y"], "rating": [1, 3]},
        {"responses": ["x", "y"], "rewards": [1.0, 3.0]},
    ],
)
def test_scores_under_other_names(record):
    entries, pairs = outline({"prompt": "q", **record})
    assert entries == [("x", 1, 1.0), ("y", 0, 3.0)] and pairs == [("y", "x")]


def test_ranks_in_a_list_of_their_own():
    record = {"question": "q", "responses": ["x", "y"], "ranks": [0.0, 1.0]}
    assert outline(record)[1] == [("x", "y")]


def test_nemo_rl_scores_are_kept_and_may_replace_ranks():
    def completion(text, **more):
        return {"completion": [{"role": "assistant", "content": text}], **more}

    context = [{"role": "user", "content": "q"}]
    both = [completion("x", rank=1.0, score=2), completion("y", rank=0, reward=5)]
    entries, pairs = outline({"context": context, "completions": both})
    assert entries == [("x", 1, 2.0), ("y", 0, 5.0)] and pairs == [("y", "x")]
    scored = [completion("x", score=2), completion("y", score=5)]
    assert outline({"context": context, "completions": scored})[0] == entries
    with pytest.raises(InputError, match="entry 2: 'rank' is missing"):
        outline({"context": context, "completions": [both[0], completion("y", score=1)]})


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"responses": ["x", "y"], "scores": [1]}, "has 2 entries and 'scores' 1"),
        ({"responses": ["x", 3], "scores": [1, 2]}, "entry 2 is a number"),
        ({"responses": ["x", "y"], "scores": [1, "2"]}, "entry 2: column 'score' is text"),
        ({"answers": [{"rank": 1}]}, "entry 1: column 'response' is missing"),
        ({"answers": [{"answer": "a", "rank": 1}, "b"]}, "entry 2 is text"),
    ],
)
def test_wrong_lists(record, message):
    with pytest.raises(InputError, match=message):
        outline({"prompt": "q", **record})
