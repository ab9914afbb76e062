"""Tokens of prompts and responses equal those of TRL's DPOTrainer, for every chat template in TRL.

Each template of TRL's folder gets a byte-level tokenizer that has the template's own markers as
special tokens. Both sides get the same Python records; TRL's side is `DPOTrainer._prepare_dataset`.
"""

import json
import re
from pathlib import Path

import pytest
from jinja2.exceptions import TemplateError

from megatron_prefix.data.read import Message
from megatron_prefix.data.read.formats import Example, ExampleResponse
from megatron_prefix.data.tokenize import PathEncoder, load_tokenizer
from megatron_prefix.data.tree import Pair
from megatron_prefix.errors import InputError

trl = pytest.importorskip("trl")

TEMPLATES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
MARKER = re.compile(r"<[^<>{}\s'\"%]{1,40}>|\[/?[A-Z_]{2,20}\]")
"""What looks like a special token in the text of a template."""

CLOCK = {
    "type": "function",
    "function": {
        "name": "clock",
        "description": "The time in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {"id": "call00001", "type": "function", "function": {"name": "clock"}}
CALL["function"]["arguments"] = {"city": "Rome"}


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


CONVERSATIONS = {
    "plain": {
        "prompt": [turn("user", "Name a river.")],
        "chosen": [turn("assistant", "The Po.")],
        "rejected": [turn("assistant", "A shoe.")],
    },
    "system": {
        "prompt": [turn("system", "Be brief."), turn("user", "Name a river.")],
        "chosen": [turn("assistant", "The Po.")],
        "rejected": [turn("assistant", "A shoe.")],
    },
    "several turns": {
        "prompt": [
            turn("user", "Name a river."),
            turn("assistant", "The Po."),
            turn("user", "Another?"),
        ],
        "chosen": [turn("assistant", "The Tiber."), turn("user", "?"), turn("assistant", "Yes.")],
        "rejected": [turn("assistant", "The Tower.")],
    },
    "tool call as response": {
        "tools": [CLOCK],
        "prompt": [turn("user", "What time is it in Rome?")],
        "chosen": [turn("assistant", "", tool_calls=[CALL])],
        "rejected": [turn("assistant", "Late.")],
    },
    "tool call in prompt": {
        "tools": [CLOCK],
        "prompt": [
            turn("user", "What time is it in Rome?"),
            turn("assistant", "", tool_calls=[CALL]),
            turn("tool", "14:05", name="clock", tool_call_id="call00001"),
        ],
        "chosen": [turn("assistant", "It is 14:05.")],
        "rejected": [turn("assistant", "It is late.")],
    },
    "reasoning": {
        "prompt": [turn("user", "Add two and two.")],
        "chosen": [turn("assistant", "4", reasoning_content="Two and two make four.")],
        "rejected": [turn("assistant", "5", reasoning_content="Two and three.")],
    },
    "thinking": {
        "prompt": [turn("user", "Add two and two.")],
        "chosen": [turn("assistant", "4", thinking="Two and two make four.")],
        "rejected": [turn("assistant", "5", thinking="Two and three.")],
    },
}


FIELDS = ("role", "content")
TAKES_NO_TEXT = ("llava_next", "llava_next_training")
"""Templates that take only lists of parts as contents."""
WRITES_NO_TEXT = ("idefics3", "idefics3_training", "smolvlm", "smolvlm_training")
"""Templates that write nothing of a content that is not a list of parts."""


def save_tokenizer(folder, template="", before=(), after=()):
    """Bytes and special tokens; `before` and `after` are what the tokenizer adds to a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(sorted({*MARKER.findall(template), "<s>", "</s>", "[gMASK]", "<sop>"}))
    if before or after:
        core.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            special_tokens=[(t, core.token_to_id(t)) for t in {*before, *after}],
        )
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    if template:
        made.chat_template = template
    made.save_pretrained(folder)
    return folder


class Preparation:
    """TRL's own preparation of one record with the tokenizer in `folder`."""

    def __init__(self, folder):
        from transformers import AutoTokenizer

        self.trainer = trl.DPOTrainer.__new__(trl.DPOTrainer)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.trainer._tokenizer, self.trainer._is_vlm = self.tokenizer, False
        self.settings = trl.DPOConfig(
            output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", max_length=None
        )

    def tokens(self, record):
        """((prompt and chosen, prompt and rejected), length of the prompt)."""
        from datasets import IterableDataset

        rows = IterableDataset.from_generator(lambda: iter([record]))
        (row,) = self.trainer._prepare_dataset(rows, self.tokenizer, self.settings, "train")
        prompt = row["prompt_ids"]
        return [prompt + row["chosen_ids"], prompt + row["rejected_ids"]], len(prompt)


def as_text(turns):
    if isinstance(turns, str):
        return turns
    extras = [{key: turn[key] for key in turn if key not in FIELDS} for turn in turns]
    return tuple(
        Message(
            role=turn["role"], content=turn["content"], extra=json.dumps(extra) if extra else ""
        )
        for turn, extra in zip(turns, extras, strict=True)
    )


def encoded(folder, record, **modes):
    prompt = as_text(record["prompt"])
    example = Example(
        responses=tuple(
            ExampleResponse(prompt=prompt, response=as_text(record[side]))
            for side in ("chosen", "rejected")
        ),
        pairs=(Pair(chosen=0, rejected=1),),
        tools=json.dumps(record["tools"]) if "tools" in record else "",
    )
    return PathEncoder(load_tokenizer(folder), **modes).encode(example)[0]


def our_tokens(folder, record, **modes):
    paths = encoded(folder, record, **modes)
    (start,) = {path.loss_start for path in paths}
    return [path.tokens.tolist() for path in paths], start


def test_trl_ships_its_templates():
    assert len(TEMPLATES) > 50


def with_text_arguments(record):
    """The record with the arguments of all tool calls as JSON text."""
    changed = json.loads(json.dumps(record))
    for turn in [turn for side in ("prompt", "chosen", "rejected") for turn in changed[side]]:
        for call in turn.get("tool_calls", ()):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return changed


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_every_template_gives_the_tokens_of_trl(template, tmp_path):
    """Equal tokens and an equal start of the response, or both refuse the conversation.

    Two differences: a response of which the template writes nothing is refused, and arguments of
    tool calls become text if the template fails on objects.
    """
    save_tokenizer(tmp_path, template.read_text(encoding="utf-8"))
    preparation = Preparation(tmp_path)
    num_equal, unwritten = 0, set()
    for name, record in CONVERSATIONS.items():
        try:
            theirs = preparation.tokens(record)
        except (TemplateError, TypeError, KeyError):
            try:
                theirs = preparation.tokens(with_text_arguments(record))
            except (TemplateError, TypeError, KeyError):
                with pytest.raises(InputError, match="chat template refuses"):
                    our_tokens(tmp_path, record)
                continue
        try:
            ours = our_tokens(tmp_path, record)
        except InputError as error:
            assert "chat template writes nothing of a response" in str(error), name
            unwritten.add(name)
            continue
        assert ours == theirs, name
        num_equal += 1
    assert unwritten <= {"tool call as response"} or template.stem in WRITES_NO_TEXT
    assert num_equal >= 4 or template.stem in (*TAKES_NO_TEXT, *WRITES_NO_TEXT)


BEGINNINGS = {"none": (), "begin-of-text": ("<s>",), "two tokens": ("[gMASK]", "<sop>")}
TEXTS = {
    "plain": ("Name it:", " yes", " no"),
    "a space before the response": ("Name it: ", "yes", "no"),
    "ends with end-of-text": ("Name it:", " yes</s>", " no</s>"),
    "only end-of-text": ("Name it:", "</s>", " no"),
}


@pytest.mark.parametrize("before", BEGINNINGS.values(), ids=BEGINNINGS)
@pytest.mark.parametrize("texts", TEXTS.values(), ids=TEXTS)
def test_texts_get_the_tokens_of_trl(before, texts, tmp_path):
    record = dict(zip(("prompt", "chosen", "rejected"), texts, strict=True))
    save_tokenizer(tmp_path, before=before)
    assert our_tokens(tmp_path, record) == Preparation(tmp_path).tokens(record)


def test_texts_of_a_template_that_ran_before_get_the_tokens_of_trl(tmp_path):
    """Begin-of-text that a text spells is the token, if the tokenizer adds none."""
    record = {"prompt": "<s>Name it:", "chosen": " yes</s>", "rejected": " no</s>"}
    save_tokenizer(tmp_path)
    assert our_tokens(tmp_path, record) == Preparation(tmp_path).tokens(record)


DIFFERENT = {
    "the tokenizer adds begin-of-text, and the text spells it: TRL has it twice": (
        {"before": ("<s>",)},
        {"prompt": "<s>Name it:", "chosen": " yes", "rejected": " no"},
        lambda theirs, begin, end: [ids[1:] for ids in theirs],
    ),
    "the tokenizer adds end-of-text: TRL has it twice": (
        {"after": ("</s>",)},
        {"prompt": "Name it:", "chosen": " yes", "rejected": " no"},
        lambda theirs, begin, end: [ids[:-1] for ids in theirs],
    ),
    "white space follows an end-of-text that the text spells: TRL adds a second": (
        {},
        {"prompt": "Name it:", "chosen": " yes</s>\n", "rejected": " no</s>\n"},
        lambda theirs, begin, end: [ids[:-1] for ids in theirs],
    ),
}


@pytest.mark.parametrize("case", DIFFERENT.values(), ids=DIFFERENT)
def test_differences_from_trl(case, tmp_path):
    added, record, ours_of = case
    tokenizer = load_tokenizer(save_tokenizer(tmp_path, **added))
    theirs, start = Preparation(tmp_path).tokens(record)
    ours, our_start = our_tokens(tmp_path, record)
    begin, end = tokenizer.bos_id, tokenizer.eos_id
    assert ours == ours_of(theirs, begin, end) != theirs
    assert our_start == start - (len(theirs[0]) - len(ours[0]) if ours[0][1] != theirs[0][1] else 0)
    assert all(ids.count(end) == 1 and ids.count(begin) <= 1 for ids in ours)


def test_special_tokens_inside_texts_stay_text(tmp_path):
    """TRL makes them tokens, as --parse-special does."""
    record = {"prompt": "a</s>b", "chosen": " yes<s>", "rejected": " no"}
    save_tokenizer(tmp_path)
    theirs, _ = Preparation(tmp_path).tokens(record)
    ours, _ = our_tokens(tmp_path, record)
    assert ours != theirs and len(ours[0]) > len(theirs[0])
