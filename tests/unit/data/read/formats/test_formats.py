"""What every format's columns become, on the samples and by hand."""

import json
import math
from pathlib import Path

import pytest

from megatron_prefix.cli.build import FORMAT_NAMES
from megatron_prefix.data.read import ExampleReader, parse_columns
from megatron_prefix.data.read.formats import FORMATS, DegenerateRecord
from megatron_prefix.errors import InputError

SAMPLES = Path(__file__).resolve().parents[4] / "data" / "formats"


def sample(name):
    lines = (SAMPLES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def read(record, format="auto", columns=None):
    return ExampleReader(format, columns).read(record)


def plain(text):
    return text if isinstance(text, str) else [(m.role, m.content) for m in text]


def outline(example):
    """(prompt, [responses], [(chosen, rejected)]) of an example with one prompt."""
    prompts = {str(plain(r.prompt)) for r in example.responses}
    assert len(prompts) == 1
    responses = [plain(r.response) for r in example.responses]
    return (
        plain(example.responses[0].prompt),
        responses,
        [(p.chosen, p.rejected) for p in example.pairs],
    )


def test_the_command_knows_every_format():
    assert sorted(FORMAT_NAMES) == sorted(FORMATS)


def test_trl_scores_margins_and_tools():
    example = read(sample("trl_text")[0])
    assert outline(example) == ("The capital of Peru is", [" Lima.", " Cusco."], [(0, 1)])
    assert [r.score for r in example.responses] == [4.5, 1.0] and example.pairs[0].margin == 3.5
    example = read(sample("trl_messages")[1])
    assert json.loads(example.tools)[0]["function"]["name"] == "weather"
    called, answered, last = example.responses[0].response
    assert called.as_dict()["tool_calls"][0]["function"]["arguments"] == {"town": "Oslo"}
    assert answered.as_dict() == {"role": "tool", "name": "weather", "content": "rain"}
    assert last.extra == "" and example.notes == ()


def test_tools_may_be_json_text():
    record = sample("trl_messages")[1]
    as_text = {**record, "tools": json.dumps(record["tools"])}
    assert read(as_text) == read(record)


def test_a_prompt_that_repeats_a_turn_of_both_dialogues_is_ignored():
    example = read(sample("ultrafeedback_binarized")[1])
    assert outline(example) == (
        [("user", "Spell cat.")],
        [[("assistant", "c-a-t")], [("assistant", "k-a-t")]],
        [(0, 1)],
    )
    other = {**sample("ultrafeedback_binarized")[1], "prompt": "Another"}
    with pytest.raises(InputError, match="both must be text, or both lists of messages"):
        read(other)


def test_ms_swift():
    system, brief = read(sample("ms_swift_response")[0]), ("system", "You are brief.")
    assert outline(system) == (
        [brief, ("user", "Tallest mountain?")],
        [[("assistant", "Everest.")], [("assistant", "It depends on many things.")]],
        [(0, 1)],
    )
    prompt, responses, _ = outline(read(sample("ms_swift_messages")[1]))
    assert len(prompt) == 3 and responses == [[("assistant", "See you.")], [("assistant", "What?")]]
    both = {**sample("ms_swift_messages")[0], "rejected_response": "x"}
    with pytest.raises(InputError, match="keep one"):
        read(both)
    with pytest.raises(InputError, match="must end with the assistant"):
        read({"messages": [{"role": "user", "content": "q"}], "rejected_response": "x"})


def test_nemo_rl_ranks_make_all_pairs():
    example = read(sample("nemo_rl")[0])
    assert [r.rank for r in example.responses] == [0, 2, 1]
    assert outline(example)[2] == [(0, 1), (0, 2), (2, 1)]
    ties = {"context": "q", "completions": [{"rank": 1, "completion": c} for c in "ab"]}
    with pytest.raises(DegenerateRecord, match="no pair"):
        read(ties)
    for bad, shown in ((None, "missing"), (-1, "-1"), (True, "True"), (1 << 31, "2147483648")):
        with pytest.raises(InputError, match=f"entry 1: 'rank' is {shown}"):
            read({"context": "q", "completions": [{"rank": bad, "completion": "a"}]})
    with pytest.raises(InputError, match="entry 1: 'completion', message 1 is text"):
        read({"context": "q", "completions": [{"rank": 0, "completion": ["a"]}]})


def test_nemo_aligner_rewards_are_scores():
    example = read(sample("nemo_aligner")[1])
    assert [r.score for r in example.responses] == [2.5, -1.0]
    assert plain(example.responses[0].response).startswith("Lake Garda.")
    turns = {"prompt": [{"role": "user", "content": "q"}], "chosen_response": "a"}
    assert outline(read({**turns, "rejected_response": "b"}))[1] == [
        [("assistant", "a")],
        [("assistant", "b")],
    ]


def test_alpaca_joins_instruction_and_input_after_system_and_history():
    prompt, responses, _ = outline(read(sample("llama_factory_alpaca")[0]))
    assert prompt == [
        ("system", "You translate."),
        ("user", "the dog"),
        ("assistant", "der Hund"),
        ("user", "Translate to German.\nthe house"),
    ]
    assert responses == [[("assistant", "das Haus")], [("assistant", "der Haus")]]
    with pytest.raises(InputError, match="history, entry 1"):
        read({"instruction": "x", "chosen": "a", "rejected": "b", "history": [["q"]]})


def test_sharegpt_functions():
    example = read(sample("llama_factory_sharegpt")[1])
    roles = [m.role for m in example.responses[0].prompt]
    assert roles == ["user", "assistant", "tool"] and "clock" in example.tools
    call = example.responses[0].prompt[1].as_dict()["tool_calls"][0]["function"]
    assert call == {"name": "clock", "arguments": {"town": "Rome"}}
    broken = {**sample("llama_factory_sharegpt")[1]}
    broken["conversations"] = [{"from": "function_call", "value": "clock"}]
    with pytest.raises(InputError, match="function call is not JSON"):
        read(broken)
    system = outline(read(sample("llama_factory_sharegpt")[0]))[0][0]
    assert system == ("system", "You know the sky.")


def test_ultrafeedback_compares_different_scores():
    example = read(sample("ultrafeedback")[0])
    assert [r.score for r in example.responses] == [4.75, 2.0, 4.0, 2.0]
    assert [r.rank for r in example.responses] == [0, 2, 1, 2]
    assert sorted(outline(example)[2]) == [(0, 1), (0, 2), (0, 3), (2, 1), (2, 3)]
    unscored = {"instruction": "q", "completions": [{"response": c} for c in "ab"]}
    with pytest.raises(DegenerateRecord, match="no pair"):
        read(unscored)
    some = {"instruction": "q", "completions": [{"response": "a", "score": 1}]}
    some["completions"] += [{"response": "b"}, {"response": "c", "overall_score": 2}]
    example = read(some)
    assert outline(example)[1] == [[("assistant", "a")], [("assistant", "c")]]
    assert outline(example)[2] == [(1, 0)]
    with pytest.raises(InputError, match="entry 1: column 'response' is missing"):
        read({"instruction": "q", "completions": [{}]})


def test_unpaired_labels_are_scores_without_pairs():
    desirable, not_desirable = (read(record) for record in sample("unpaired"))
    assert (desirable.pairs, desirable.responses[0].score) == ((), 1.0)
    assert (not_desirable.pairs, not_desirable.responses[0].score) == ((), 0.0)
    assert read({"prompt": "p", "completion": "c", "label": 1.0}).responses[0].score == 1.0
    with pytest.raises(InputError, match="'label' is a number"):
        read({"prompt": "p", "completion": "c", "label": 2})
    with pytest.raises(InputError, match="'label' is null"):
        read({"prompt": "p", "completion": "c", "label": None})


def test_weights_apply_to_all_pairs_of_a_record():
    example = read({**sample("nemo_rl")[0], "weight": 0.5})
    assert [p.weight for p in example.pairs] == [0.5] * 3
    assert all(math.isnan(p.margin) for p in example.pairs)


def test_map_takes_columns_from_dotted_paths():
    record = {
        "question": {"text": "p"},
        "answers": [{"text": "a"}, {"text": "b"}],
        "with.dot": 2,
        "id": 7,
    }
    flags = ["prompt=question.text", "chosen=answers.0.text", "rejected=answers.1.text"]
    example = read(record, columns=parse_columns([*flags, "margin=with.dot"]))
    assert outline(example) == ("p", ["a", "b"], [(0, 1)]) and example.pairs[0].margin == 2.0
    for path, step in (("answers.2.text", "'2' in a list"), ("question.txt", "'txt' in an object")):
        with pytest.raises(InputError, match=f"--map chosen={path}: there is no {step}"):
            read(record, columns={"chosen": path})


@pytest.mark.parametrize("text", ["chosen", "=x", "chosen=", ""])
def test_maps_of_another_form(text):
    with pytest.raises(InputError, match="is not COLUMN=PATH"):
        parse_columns([text])


def test_a_column_is_mapped_once():
    with pytest.raises(InputError, match="'prompt' twice"):
        parse_columns(["prompt=b", "prompt=c"])
