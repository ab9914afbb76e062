"""Random sets of known columns in random layouts: every text is read or listed, or refused by name.

Each value contains a word of its own, so that it can be recognised wherever it goes.
"""

import json
import random
import re

import pytest

from megatron_prefix.data.read import ExampleReader
from megatron_prefix.data.read.column_names import TEXT
from megatron_prefix.data.read.formats import FORMATS, DegenerateRecord
from megatron_prefix.errors import InputError

PROMPTS = ("prompt", "question", "instruction", "input", "messages", "conversations", "context")
SIDES = (("chosen", "rejected"), ("chosen_response", "rejected_response"))
SIDES += (("response_0", "response_1"), ("response_a", "response_b"), ("answer_0", "answer_1"))
LABELS = {"label": (True, 1, 0), "winner": ("a", "model_b", "tie"), "better_response_id": (0, 1)}
LABELS |= {"overall_preference": (-2, 1, 0), "score_chosen": (1, 2.5), "score_rejected": (2,)}
LABELS |= {"margin": (0.5,), "id": ("x1",), "source": ("web",), "score_0": (1.0,), "score_1": (0,)}
OTHERS = sorted({*TEXT, *(n for f in FORMATS.values() for n in f.columns), "note", "image"})
IGNORE = re.compile(r"--ignore-columns (\S+)$")


class Record:
    """A random record, and which word each of its columns contains."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.words: dict[str, list[str]] = {}
        self.is_wild = self.random.random() < 0.4
        prompts = self.random.choice((0, 1, 2)) if self.is_wild else 1
        names = self.random.sample(PROMPTS, prompts)
        sides = self.random.choice(SIDES) if self.random.random() < 0.95 else ()
        names += (*sides, *self.random.sample(OTHERS, self.random.choice((0, 0, 1, 1, 2))))
        labels = self.random.sample(sorted(LABELS), self.random.choice((0, 1, 2)))
        self.value = {name: self.random.choice(LABELS[name]) for name in labels}
        like = self.random.choice((self.text, self.turns))
        for name in dict.fromkeys(names):
            make = like if name in sides or not self.is_wild else self.some
            if name in ("messages", "conversations"):
                make = self.turns
            self.value[name] = make(name)

    def word(self, name: str) -> str:
        word = f"w{len(self.words)}x{self.random.randrange(10**6)}"
        self.words.setdefault(name, []).append(word)
        return word

    def text(self, name: str) -> str:
        start = self.random.choice(("", "The ", "\n\nHuman: q\n\nAssistant: ")[: 2 + self.is_wild])
        return f"{start}{self.word(name)} end"

    def turns(self, name: str):
        roles = ["user", "assistant"] if self.is_wild else ["assistant"]
        roles = ["user"] if name in PROMPTS else roles
        keys = self.random.choice((("role", "content"), ("from", "value")))
        turns = [{keys[0]: role, keys[1]: self.word(name)} for role in roles]
        kind = self.random.randrange(5)
        if kind == 0:
            return json.dumps(turns)
        if kind == 1 and len(turns) == 1:
            return turns[0]
        if kind == 2:
            return {key: [turn[key] for turn in turns] for key in keys}
        if kind == 3:
            field = self.random.choice(("images", "thinking", "context", "weight", "system"))
            turns[-1][field] = self.word(f"message.{field}")
        return turns

    def some(self, name: str):
        kinds = (self.text, self.text, self.turns, self.texts, self.entries, self.empty)
        return self.random.choice(kinds)(name)

    def texts(self, name: str):
        return [self.word(name) for _ in range(2)]

    def entries(self, name: str):
        return [{"response": self.word(name), "score": i} for i in range(2)]

    def empty(self, name: str):
        return self.random.choice((None, "", [], {}))


def read(record: Record):
    """The Example, and the reader; columns that an error says to leave out are left out.

    Returns None if the record is refused for another reason, or has nothing to compare.
    """
    ignored: list[str] = []
    while True:
        reader = ExampleReader(ignored=ignored)
        try:
            return reader.read(json.loads(json.dumps(record.value))), reader
        except DegenerateRecord:
            return None
        except InputError as error:
            names = {*record.value, *(name.split(".")[-1] for name in record.words)}
            assert any(name in str(error) for name in names) or not record.value, error
            name = IGNORE.search(str(error).split("; the record was taken")[0])
            if name is None:
                return None
            assert name[1] not in ignored, error
            ignored.append(name[1])


@pytest.mark.parametrize("block", range(8))
def test_every_text_is_read_or_listed_or_refused(block):
    num_built = 0
    for seed in range(block * 1000, (block + 1) * 1000):
        record = Record(seed)
        outcome = read(record)
        if outcome is None:
            continue
        example, reader = outcome
        num_built += 1
        texts = repr([(r.prompt, r.response) for r in example.responses])
        texts += example.tools + example.template_kwargs + repr(example.images)
        words = [(name, word) for name, words in record.words.items() for word in words]
        for name, word in words:
            column = next(n for n, value in record.value.items() if word in json.dumps(value))
            assert word in texts or {name, column} & {*reader.unread}, (
                f"seed {seed}: {name} of {record.value} as {reader.format}"
            )
    assert num_built > 100
