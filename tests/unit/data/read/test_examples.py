import gzip
import json
import math

import pytest

from megatron_prefix.data.read import ExampleReader, Inputs, Message, common_prefix
from megatron_prefix.data.read.formats import DegenerateRecord, detect_format
from megatron_prefix.errors import InputError

H, A = "\n\nHuman:", "\n\nAssistant:"


def read(record, format="auto"):
    return ExampleReader(format).read(record)


def texts(example):
    return [(r.prompt, r.response) for r in example.responses]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def turns(*contents):
    roles = ("user", "assistant")
    return tuple(Message(role=roles[i % 2], content=c) for i, c in enumerate(contents))


def test_whole_dialogues_share_all_turns_but_the_last():
    start = f"{H} Hi{A} Hello{H} Why?{A}"
    example = read({"chosen": start + " Because.", "rejected": start + " Before."})
    assert texts(example) == [(start, " Because."), (start, " Before.")]
    assert [(p.chosen, p.rejected, p.weight) for p in example.pairs] == [(0, 1, 1.0)]
    assert math.isnan(example.pairs[0].margin) and example.notes == ()


def test_dialogues_that_part_early_keep_the_later_turns_in_the_responses():
    start = f"{H} Hi{A}"
    chosen, rejected = f"{start} Yes{H} And?{A} So.", f"{start} No"
    example = read({"chosen": chosen, "rejected": rejected})
    assert texts(example) == [(start, f" Yes{H} And?{A} So."), (start, " No")]
    assert len(example.notes) == 1 and "before the last turn" in example.notes[0]


def test_a_marker_both_share_only_in_part_does_not_end_the_prompt():
    chosen, rejected = f"{H} a{A} b{A} c", f"{H} a{A} b\n\nAssist me"
    assert texts(read({"chosen": chosen, "rejected": rejected}))[0][0] == f"{H} a{A}"


def test_dialogues_without_markers_part_at_white_space():
    example = read({"chosen": "the sky is blue", "rejected": "the sky is black"})
    assert texts(example) == [("the sky is", " blue"), ("the sky is", " black")]
    example = read({"chosen": "one two", "rejected": "one two three"})
    assert texts(example) == [("one", " two"), ("one", " two three")]


def test_blank_response_is_kept_and_noted():
    start = f"{H} Hi{A}"
    example = read({"chosen": start, "rejected": start + " No"})
    assert texts(example)[0] == (start, "") and "white space" in example.notes[0]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"chosen": "same", "rejected": "same"}, "chosen equals rejected"),
        ({"chosen": "abc", "rejected": "abd"}, "no common prompt"),
        ({"chosen": f"{H} a{A} x", "rejected": f"{H} b{A} x"}, "no common prompt"),
        ({"prompt": "p", "chosen": "x", "rejected": "x"}, "chosen equals rejected"),
        ({"prompt": [], "chosen": [assistant("a")], "rejected": [assistant("b")]}, "prompt token"),
        ({"prompt": [user("q")], "chosen": [], "rejected": [assistant("b")]}, "response token"),
        ({"chosen": [assistant("a")], "rejected": [assistant("b")]}, "no common prompt"),
    ],
)
def test_degenerate_records(record, reason):
    with pytest.raises(DegenerateRecord, match=reason):
        read(record)


def test_whole_dialogues_as_messages():
    shared = [user("q1"), assistant("a1"), user("q2")]
    record = {"chosen": [*shared, assistant("good")], "rejected": [*shared, assistant("bad")]}
    example = read(record)
    assert example.responses[0].prompt == turns("q1", "a1", "q2")
    assert [r.response for r in example.responses] == [
        (Message(role="assistant", content=c),) for c in ("good", "bad")
    ]


def test_messages_that_part_at_a_user_turn_go_back_to_the_assistant():
    chosen = [user("q"), assistant("a"), user("x"), assistant("b")]
    rejected = [user("q"), assistant("a"), user("y"), assistant("c")]
    example = read({"chosen": chosen, "rejected": rejected})
    assert example.responses[0].prompt == turns("q") and len(example.responses[0].response) == 3
    assert len(example.notes) == 1


def test_a_dialogue_that_continues_after_the_end_of_the_other():
    short = [user("q"), assistant("a")]
    example = read({"chosen": short, "rejected": [*short, user("r"), assistant("b")]})
    assert example.responses[0].prompt == turns("q")
    assert [len(r.response) for r in example.responses] == [1, 3]


def test_trl_strings_and_numbers():
    record = {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 2, "weight": 0.5}
    example = read({**record, "score_chosen": 1.5, "score_rejected": -1, "id": "ignored"})
    assert texts(example) == [("p", "a"), ("p", "b")]
    assert [(r.rank, r.score) for r in example.responses] == [(0, 1.5), (1, -1.0)]
    assert (example.pairs[0].margin, example.pairs[0].weight) == (2.0, 0.5)


def test_trl_messages():
    record = {
        "prompt": [{"role": "system", "content": "s"}, user("q")],
        "chosen": [assistant("a")],
        "rejected": [assistant("b")],
    }
    example = read(record)
    assert [m.role for m in example.responses[1].prompt] == ["system", "user"]
    assert example.responses[1].response == (Message(role="assistant", content="b"),)


def test_sharegpt_roles():
    record = {
        "conversations": [
            {"from": "system", "value": "s"},
            {"from": "human", "value": "q"},
            {"from": "gpt", "value": "a"},
            {"from": "user", "value": "r"},
        ],
        "chosen": {"from": "gpt", "value": "x"},
        "rejected": {"from": "assistant", "value": "y"},
    }
    example = read(record)
    roles = [m.role for m in example.responses[0].prompt]
    assert roles == ["system", "user", "assistant", "user"]
    assert [r.response[0].content for r in example.responses] == ["x", "y"]


def node(text, *replies, rank=None, role="assistant"):
    return {"text": text, "role": role, "rank": rank, "replies": list(replies)}


def asked(text, *replies):
    return node(text, *replies, role="prompter")


def test_oasst_pairs_pruning_and_order_by_hand():
    tree = asked(
        "q",
        node("worst", rank=2),
        node("tied a", rank=1),
        node("best", asked("q2", node("b2", rank=1), node("b1", rank=0)), rank=0),
        node("tied b", rank=1),
        node("unranked", asked("q3", node("only", rank=0))),
        node("no label", asked("q4", node("c1"), node("c2", rank=0))),
    )
    example = read({"message_tree_id": "t", "prompt": tree})
    contents = [r.response[0].content for r in example.responses]
    assert contents == ["worst", "tied a", "best", "tied b", "b2", "b1"]
    assert [r.set_id for r in example.responses] == [0, 0, 0, 0, 1, 1]
    assert [r.rank for r in example.responses] == [2, 1, 0, 1, 1, 0]
    compared = [(contents[p.chosen], contents[p.rejected]) for p in example.pairs]
    assert sorted(compared) == sorted(
        [
            ("tied a", "worst"),
            ("best", "worst"),
            ("tied b", "worst"),
            ("best", "tied a"),
            ("best", "tied b"),
            ("b1", "b2"),
        ]
    )
    assert example.responses[4].prompt == turns("q", "best", "q2")


def test_oasst_sets_come_depth_first_in_the_records_order():
    def branch(name, *below):
        labelled = [node(f"{name}{i}", *(below if i == 0 else ()), rank=i) for i in range(2)]
        return asked(name, *labelled)

    tree = node("a", branch("x", branch("y")), branch("z"))
    example = read({"prompt": asked("q", tree, node("b", branch("w")))})
    contents = [r.response[0].content for r in example.responses]
    assert contents == ["x0", "x1", "y0", "y1", "z0", "z1", "w0", "w1"]
    assert [r.set_id for r in example.responses] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_oasst_unranked_message_is_in_the_prompts_below():
    deep = asked("q2", node("x", rank=0), node("y", rank=1))
    example = read({"prompt": asked("q", node("kept", deep), node("gone", rank=0))})
    assert [r.response[0].content for r in example.responses] == ["x", "y"]
    assert example.responses[0].prompt == turns("q", "kept", "q2")
    assert example.responses[0].set_id == 0


def test_oasst_ranks_that_are_not_numbers_are_gaps():
    tree = asked("q", node("a", rank=0.0), node("b", rank=1.0), node("c", rank=math.nan))
    assert [r.response[0].content for r in read({"prompt": tree}).responses] == ["a", "b"]


def test_oasst_without_a_label_is_degenerate():
    with pytest.raises(DegenerateRecord, match="no pair"):
        read({"prompt": asked("q", node("a", rank=0), node("b"))})


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"a": 1}, "columns a"),
        ({}, "none"),
        ({"prompt": "p", "chosen": "a"}, "'rejected' is missing"),
        ({"chosen": "a"}, "'rejected' is missing"),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, "'prompt' is null"),
        ({"prompt": "p", "chosen": ["a"], "rejected": ["b"]}, "message 1 is text"),
        ({"prompt": "p", "chosen": "a", "rejected": ["b"]}, "'rejected' is a list"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": "1"}, "'margin' is text"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": True}, "a boolean"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": 10**400}, "finite"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": math.nan}, "finite"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "weight": 0}, "above 0"),
        ({"prompt": "p", "chosen": "a\ud800", "rejected": "b"}, "surrogate"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "tools": {"a": 1}}, "list of objects"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "tools": "{"}, "not JSON"),
        (
            {"prompt": "p", "chosen": "a", "rejected": "b", "images": ["x"]},
            "1 image, and its prompt is a text without <image>",
        ),
        ({"prompt": [user("q")], "chosen": [user("a")], "rejected": [assistant("b")]}, "begins"),
        ({"prompt": [user("q")], "chosen": ["a"], "rejected": []}, "message 1 is text"),
        ({"prompt": [assistant("q")], "chosen": [assistant("a")], "rejected": []}, None),
        ({"conversations": "x", "chosen": {}, "rejected": {}}, "'conversations' is text"),
        (
            {"conversations": [{"from": "bot", "value": "x"}], "chosen": {}, "rejected": {}},
            "'bot'",
        ),
        ({"prompt": {"text": 3, "role": "prompter", "replies": []}}, "'text' is a number"),
        ({"prompt": {"text": "x", "role": "someone"}}, "'role'"),
        ({"prompt": asked("q", node("a", rank=-1))}, "whole number"),
        ({"prompt": asked("q", node("a", rank=0.5))}, "whole number"),
    ],
)
def test_wrong_records(record, message):
    error = DegenerateRecord if message is None else InputError
    with pytest.raises(error, match=message):
        read(record)


def test_prompt_that_ends_with_the_assistant_is_wrong():
    record = {"prompt": [assistant("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
    with pytest.raises(InputError, match="ends with the assistant"):
        read(record)


def test_later_records_must_have_the_first_ones_format():
    reader = ExampleReader()
    with pytest.raises(InputError):
        reader.read({"conversations": 1})
    reader.read({"prompt": "p", "chosen": "a", "rejected": "b"})
    with pytest.raises(InputError, match="'hh', but the records before have 'trl'"):
        reader.read({"chosen": f"{H}{A} a", "rejected": f"{H}{A} b"})
    with pytest.raises(InputError, match="mixed"):
        reader.read({"prompt": [user("q")], "chosen": [assistant("a")], "rejected": []})


def test_a_forced_format_reads_whole_dialogues_beside_a_prompt_column():
    shared = [user("q")]
    record = {
        "prompt": "q",
        "chosen": [*shared, assistant("a")],
        "rejected": [*shared, assistant("b")],
    }
    assert detect_format(record) == "trl"
    assert read(record, "hh").responses[0].prompt == turns("q")
    with pytest.raises(InputError, match="not one of auto, sharegpt"):
        ExampleReader("parquet")


@pytest.mark.parametrize(
    "pair", [("", "a"), ("abc", "abd"), ("abc", "abc"), ("ab", "abc"), ("é", "e")]
)
def test_common_prefix(pair):
    n = 0
    while n < min(map(len, pair)) and pair[0][n] == pair[1][n]:
        n += 1
    assert common_prefix(*pair) == n


def test_real_dialogues(data_dir):
    reader = ExampleReader()
    examples = [reader.read(r.value) for r in Inputs([data_dir / "hh_pairs.jsonl.gz"]).read()]
    assert reader.format == "hh" and len(examples) == 1800
    notes = [note for example in examples for note in example.notes]
    assert sum("before the last turn" in note for note in notes) == 5
    assert sum("white space" in note for note in notes) == 4
    assert all(r.prompt.endswith(A) for example in examples for r in example.responses)


def test_real_trees(data_dir):
    path = data_dir / "oasst_trees.jsonl.gz"
    reader = ExampleReader()
    examples = [reader.read(r.value) for r in Inputs([path]).read()]
    assert reader.format == "oasst" and len(examples) == 75
    with gzip.open(path, "rt", encoding="utf-8") as file:
        expected = sum(count_pairs(json.loads(line)["prompt"]) for line in file)
    assert sum(len(example.pairs) for example in examples) == expected == 582


def count_pairs(message):
    ranks = [r["rank"] for r in message["replies"] if r.get("rank") is not None]
    own = sum(a != b for i, a in enumerate(ranks) for b in ranks[:i])
    return own + sum(count_pairs(reply) for reply in message["replies"])


def test_chat_template_kwargs_are_kept_as_json():
    record = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
    for value in ({"enable_thinking": False}, '{"enable_thinking": false}'):
        example = read({**record, "chat_template_kwargs": value})
        assert example.template_kwargs == '{"enable_thinking":false}'
    assert read({**record, "chat_template_kwargs": None}).template_kwargs == ""
    for value, message in (
        ([1], "it must be an object"),
        ("{", "is text, but not JSON"),
    ):
        with pytest.raises(InputError, match=f"'chat_template_kwargs' .*{message}"):
            read({**record, "chat_template_kwargs": value})


def test_prompt_and_responses_may_be_text_or_messages():
    turns_, text = [user("q")], "q"
    sides = ({"chosen": "a", "rejected": "b"},)
    sides += ({"chosen": [assistant("a")], "rejected": [assistant("b")]},)
    sides += ({"chosen": assistant("a"), "rejected": assistant("b")},)
    expected = [(turns("q"), (Message(role="assistant", content=c),)) for c in "ab"]
    for prompt in (turns_, text, user("q")):
        for side in sides:
            built = texts(read({"prompt": prompt, **side}))
            assert built == expected or (prompt, side) == (text, sides[0])
    whole = {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}
    for prompt in (turns_, text):
        assert texts(read({"prompt": prompt, **whole})) == expected
    with pytest.raises(InputError, match="no user's turn of the dialogues"):
        read({"prompt": "another", **whole})
    with pytest.raises(InputError, match="begins with role 'user'"):
        read({"prompt": [user("another")], **whole})


def test_labels_of_unpaired_responses():
    record = {"prompt": "p", "completion": "c"}
    for value, score in ((True, 1.0), (1, 1.0), (1.0, 1.0), (False, 0.0), (0, 0.0)):
        assert read({**record, "label": value}).responses[0].score == score
    for value in (2, "true", None, 0.5):
        with pytest.raises(InputError, match="must be true or false, or 1 or 0"):
            read({**record, "label": value})
    with pytest.raises(InputError, match="'messages' must end with the assistant's turn"):
        read({"messages": [user("q")], "label": True})


def test_rejected_answers_of_ms_swift_in_lists():
    record = {"messages": [user("q"), assistant("a")]}
    example = read({**record, "rejected_response": ["b", "c"]})
    assert [(p.chosen, p.rejected) for p in example.pairs] == [(0, 1), (0, 2)]
    assert [r.set_id for r in example.responses] == [0, 0, 0]
    longer = {"messages": [user("q"), assistant("x"), assistant("a")]}
    example = read({**longer, "rejected_response": [assistant("b"), assistant("c")]})
    assert [len(r.response) for r in example.responses] == [2, 2]
    assert example.responses[0].prompt == turns("q")
    with pytest.raises(InputError, match="entry 2 is a number, but the first one is text"):
        read({**record, "rejected_response": ["b", 3]})
    with pytest.raises(DegenerateRecord, match="no pair"):
        read({**record, "rejected_response": []})


def test_a_system_column_comes_first():
    record = {"messages": [user("q")], "chosen": "a", "rejected": "b"}
    for name in ("system", "system_prompt"):
        prompt = read({**record, name: "s"}).responses[0].prompt
        assert [m.role for m in prompt] == ["system", "user"]
    same = {"messages": [{"role": "system", "content": "s"}, user("q")]}
    assert len(read({**record, **same, "system": "s"}).responses[0].prompt) == 2
    with pytest.raises(InputError, match="two different system messages"):
        read({**record, **same, "system": "t"})
    with pytest.raises(InputError, match="system and system_prompt are different"):
        read({**record, "system": "s", "system_prompt": "t"})
