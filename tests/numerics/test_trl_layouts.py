"""Conversations in every layout have the tokens that TRL's DPOTrainer prepares for TRL's layout.

Each sample of tests/data/formats is built, and its records are written by hand below in TRL's own
columns. The judge is `DPOTrainer._prepare_dataset` on those.
"""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
from test_format_samples import SAMPLES
from test_format_samples import tokenizer as tokenizer  # noqa: F401

from megatron_prefix.data.build import build_dataset
from megatron_prefix.data.store import PreferenceDataset

pytestmark = [
    pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed: pip install trl"),
    pytest.mark.filterwarnings("ignore"),
]


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


def row(prompt, chosen, rejected, **more):
    """A record of TRL; a text is one message."""
    prompt = [user(prompt)] if isinstance(prompt, str) else prompt
    sides = [[assistant(s)] if isinstance(s, str) else s for s in (chosen, rejected)]
    return {"prompt": prompt, "chosen": sides[0], "rejected": sides[1], **more}


def lake(name):
    """A call of the tool in the samples."""
    function = {"name": "depth", "arguments": {"lake": name}}
    return [{"id": "c1", "type": "function", "function": function}]


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "depth",
            "description": "The depth of a lake.",
            "parameters": {"type": "object", "properties": {"lake": {"type": "string"}}},
        },
    }
]
BOATS = [user("Hi"), assistant("Hello!"), user("Name a boat.")]
IN_TRL = {
    "question_system": [
        row(
            [system("You are brief."), user("Which planet is nearest to the sun?")],
            "Mercury.",
            "That would be Pluto, I think.",
        ),
        row("What do bees make?", "Honey.", "Wool."),
    ],
    "messages_object": [
        row([system("Be polite."), user("May I come in?")], "Please do.", "No."),
        row([user("Two and two?"), assistant("Four."), user("And three?")], "Seven.", "Nine."),
    ],
    "messages_text": [
        row("Name a metal.", "Iron.", "Cheese."),
        row("Name a gas.", "Helium.", "A brick."),
    ],
    "sharegpt_role_content": [
        row("Where do penguins live?", "In the south.", "In the north."),
        row("What do they eat?", "Fish.", "Grass."),
    ],
    "ultrainteract": [
        row("Solve x + 1 = 3.", "x = 2", "x = 4"),
        row([user("Solve 2 x = 8."), assistant("print(8 / 2)"), user("4.0")], "x = 4", "x = 16"),
    ],
    "trl_text_prompt_messages": [
        row("Name a tree.", "An oak.", "A stone."),
        row("Name a bird.", "A heron.", "A carpet."),
    ],
    "trl_message_prompt_texts": [
        row([system("One word."), user("Name a fish.")], "Trout.", "I like fish."),
        row("Name a wine.", "Barolo.", "Milk."),
    ],
    "trl_text_parts": [
        row("Name a king.", "Arthur.", "A chair."),
        row("Name a queen.", "Anne.", "A table."),
    ],
    "trl_json_texts": [
        row("Name a town.", "Lucca.", "A spoon."),
        row("Name a river.", "The Arno.", "A fork."),
    ],
    "trl_transposed": [
        row("Name a song.", "Yesterday.", "A shoe."),
        row("Name a dance.", "The waltz.", "A nail."),
    ],
    "trl_json_tools": [
        row(
            "How deep is Lake Como?",
            [assistant("", tool_calls=lake("Como"))],
            "I do not know.",
            tools=TOOLS,
        ),
        row(
            "How deep is Lake Iseo?",
            [assistant("", tool_calls=lake("Iseo"))],
            "Very.",
            tools=TOOLS,
        ),
    ],
    "ms_swift_tools": [
        row(
            [
                user("How deep is Lake Garda?"),
                assistant("", tool_calls=lake("Garda")),
                {"role": "tool", "content": "346 m"},
            ],
            "346 metres.",
            "I cannot know.",
            tools=TOOLS,
        ),
        row("Is it cold?", "Yes.", "No.", tools=TOOLS),
    ],
    "ms_swift_query": [
        row(
            [
                system("Be brief."),
                user("Name a sand."),
                assistant("Quartz."),
                user("Name a shell."),
            ],
            "A cowrie.",
            "A shovel.",
        ),
        row("Name a reef.", "The Great Barrier Reef.", "A roof."),
    ],
    "nemo_rl_scores": [
        row("Name a day.", "Monday.", "A month."),
        row("Name a month.", "June.", "A week."),
    ],
    "helpsteer2": [
        row("Name a cheese.", "Pecorino.", "A boat."),
        row(BOATS, "A gondola.", "A raft?"),
    ],
    "helpsteer3_preference": [
        row("Name a herb.", "Basil.", "Wood."),
        row([user("Hello"), assistant("Hello!"), user("Name an oil.")], "Olive oil.", "Water."),
    ],
    "chatbot_arena": [
        row("Name an opera.", "Aida.", "A drum."),
        row([user("Hi"), assistant("Hello"), user("Name a drum.")], "A tabla.", "An opera."),
    ],
    "arena_votes": [
        row("Name a planet.", "Saturn.", "A kettle."),
        row([user("Hi"), assistant("Hello"), user("Name a moon.")], "Europa.", "A pot."),
    ],
    "oasst_messages": [
        row("Name a spoon.", "A ladle.", "A fork."),
        row(
            [user("Hello"), assistant("Hello!"), user("Name a bridge.")],
            "The Ponte Vecchio.",
            "A well.",
        ),
    ],
}
"""Sample -> its records as TRL has them; the samples not named here are no conversations, or have
TRL's columns already."""


def trl_tokens(folder, records):
    """(prompt, chosen, rejected) of each record, as token ids."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOTrainer
    from trl.trainer.dpo_config import DPOConfig

    tokenizer = AutoTokenizer.from_pretrained(folder)
    trainer = object.__new__(DPOTrainer)
    trainer._tokenizer = tokenizer
    args = DPOConfig(output_dir=str(folder / "out"), max_length=None, report_to=[], use_cpu=True)
    for record in records:  # one by one: Arrow would give every tool call the others' arguments
        (made,) = trainer._prepare_dataset(Dataset.from_list([record]), tokenizer, args, "train")
        yield made["prompt_ids"], made["chosen_ids"], made["rejected_ids"]


@pytest.mark.parametrize("name", IN_TRL)
def test_tokens_of_a_layout(name, tokenizer, tmp_path):  # noqa: F811
    build_dataset([SAMPLES / f"{name}.jsonl"], str(tokenizer), tmp_path / "set")
    dataset = PreferenceDataset(tmp_path / "set")
    theirs = list(trl_tokens(tokenizer, IN_TRL[name]))
    assert len(dataset) == len(theirs)
    for tree, (prompt, *sides) in zip(dataset, theirs, strict=True):
        (pair,) = tree.pairs.tolist()
        for response, side in zip(pair, sides, strict=True):
            tokens, start = tree.response_tokens(response)
            ours = json.dumps([tokens[:start].tolist(), tokens[start:].tolist()])
            assert ours == json.dumps([prompt, side])
