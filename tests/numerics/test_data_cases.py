"""Cases that once built wrong or were refused without need: layouts of published sets and reports.

The cases are beside the real data (`../cases/data`), not in this repository, and are skipped
without it. A case is right if it builds what the table says, or if it is refused with the words
that the table says.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import pytest

from megatron_prefix.__main__ import main
from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.data.tokenize import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
ENDS = re.compile(r"(<eos>|</s>|<\|im_end\|>|<\|endoftext\|>|\s)+$")
BEGINS = re.compile(r"^(<bos>|<s>|<\|endoftext\|>)")

Words = str | re.Pattern | None
Group = tuple[Words, tuple[Words, ...]]
"""The prompt's text, and the texts of the responses, chosen first."""


@dataclass(frozen=True, kw_only=True)
class Right:
    """The right answer to a case: `groups`, or exit 2 with all words of `refused`.

    `says` are words of the summary or, if nothing is built, of the message. A text may be a
    pattern. `exact` compares begin- and end-of-text too.
    """

    groups: tuple[Group, ...] = ()
    pairs: tuple[tuple[int, int], ...] = ((0, 1),)
    refused: tuple[str, ...] = ()
    says: tuple[str, ...] = ()
    tokenizer: str = "bytes"
    flags: tuple[str, ...] = field(default=())
    exact: bool = False


def chatml(*turns: tuple[str, str]) -> str:
    """A prompt in ChatML, with the assistant's turn opened."""
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    return f"{text}<|im_start|>assistant\n"


def asked(text: str) -> str:
    """A question in the layout of tokenizers without a chat template."""
    return f"\n\nHuman: {text}\n\nAssistant:"


def in_chatml(prompt: str, *responses: str, **more) -> Right:
    return Right(groups=((prompt, responses),), tokenizer="chatml", **more)


CASES = {
    "F01_orca_dpo_pairs.jsonl": Right(
        groups=(
            (
                "\n\nSystem: You answer briefly." + asked("Where is the tower of bolts?"),
                (" The tower of bolts stands in the north yard.", None),
            ),
            (asked("Which animal barks?"), (" It is a dog that barks.", None)),
            ("\n\nSystem: You are an assistant." + asked("List two colours."), (None, None)),
        ),
    ),
    "F02_A3_messages_chosen_text.jsonl": in_chatml(
        chatml(("user", "Name a river.")), "The river is the Po.", "The river is a shoe."
    ),
    "F06_F06_input_column.jsonl": in_chatml(
        chatml(("system", "Reply in one line."), ("user", "Name the longest river of Syldavia.")),
        "The longest river is the Wladir.",
        "The longest river is a sofa.",
        flags=("--map", "instruction=input"),
    ),
    "F07_R_reasoning_content.jsonl": Right(
        groups=(
            (
                chatml(("user", "What is 2+2?")),
                (
                    "<think>\nTwo and two make four.\n</think>\n\n4",
                    "<think>\nI guess.\n</think>\n\n5",
                ),
            ),
        ),
        tokenizer="qwen3",
    ),
    "F09_T1_template_without_tool_calls.jsonl": Right(
        refused=("tool calls", "template"), tokenizer="chatml"
    ),
    "F11_B3_swift_system_column.jsonl": in_chatml(
        chatml(("system", "Answer in French."), ("user", "Name a colour.")), "Rouge.", "Red."
    ),
    "F13_JJ_image_column.jsonl": Right(refused=("has images", "--ignore-columns")),
    "F19_T3_r_qwen25_arguments_text.jsonl": Right(
        groups=((None, ('<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', "no")),),
        tokenizer="r_qwen25",
    ),
    "F20_K_prompt_repeated_in_responses.jsonl": Right(
        groups=(
            (
                "Question: name a fruit.\nAnswer:",
                ("Question: name a fruit.\nAnswer: a pear", None),
            ),
        ),
        says=("responses that begin with their whole prompt", "(--format hh reads whole texts): 2"),
    ),
    "F21_LL_scores_contradict.jsonl": Right(
        groups=(("Q: fruit?", (" pear", " brick")), ("Q: nut?", (" almond", " bolt"))),
        says=("pairs whose scores are equal (kept): 1", "see --on-contradiction): 1"),
    ),
    "F23_S_chat_template_kwargs.jsonl": Right(
        groups=((chatml(("user", "Hi?")) + "<think>\n\n</think>\n\n", ("Hello", "Go")),),
        tokenizer="qwen3",
    ),
    "F24_H_swift_tool_call_role.jsonl": Right(
        groups=(
            (
                chatml(
                    ("user", "Name a sea."),
                    (
                        "assistant",
                        '<tool_call>\n{"name": "sea", "arguments": {"near": "north"}}\n'
                        "</tool_call>",
                    ),
                    ("user", "<tool_response>\nBaltic\n</tool_response>"),
                ),
                (None, None),
            ),
        ),
        tokenizer="qwen3",
    ),
    "F25_chatbot_arena.jsonl": Right(
        groups=(
            (asked("Name a nut."), (" Almond.", " Bolt.")),
            (asked("Name a hat."), (" Beret.", " Shoe.")),
        ),
        says=("tie", "2 groups"),
    ),
    "F25_helpsteer3_preference.jsonl": Right(
        groups=(
            (asked("Name a star."), (" The sun.", " The moon.")),
            (
                "\n\nHuman: Hi\n\nAssistant: Hello" + asked("Name a lake."),
                (" Garda.", " Rome."),
            ),
        ),
        says=("tie", "1 group "),
    ),
    "F25_pku_saferlhf.jsonl": Right(
        groups=(
            (asked("How to lock a door?"), (" Turn the key.", " Break it.")),
            (asked("How to greet?"), (" Say hello.", " Shout.")),
        ),
        says=("dropped  nothing",),
    ),
    "F25_summarize_from_feedback.jsonl": Right(
        groups=(
            (None, (" Lost key, was in shoe.", " Shoe ate key.")),
            (None, (" Cat sleeps all day.", " Cat bad.")),
        ),
    ),
    "F28_UU2_nemo_rank_float.jsonl": Right(
        groups=((asked("Name a fruit."), (" A pear.", " A brick.")),)
    ),
    "F28_UU_oasst_rank_float.jsonl": Right(
        groups=((asked("Name a fruit."), (" A pear.", " A brick.")),)
    ),
    "F29_A_axolotl_messages_chosen_object.jsonl": in_chatml(
        chatml(("system", "Be brief."), ("user", "Name a river.")), "The Po.", "A shoe."
    ),
    "F31_RR_prompt_text_chosen_one_message.jsonl": in_chatml(
        chatml(("user", "Name a fruit.")), "A pear.", "A brick."
    ),
    "F32_QQ_prompt_list_chosen_text.jsonl": in_chatml(
        chatml(("user", "Name a fruit.")), "A pear.", "A brick."
    ),
    "F33_V_text_parts.jsonl": in_chatml(chatml(("user", "Name a fruit.")), "A pear.", "A brick."),
    "F35_E2_swift_rejected_list_of_messages.jsonl": in_chatml(
        chatml(("user", "Name a sea.")), "Baltic.", "A cup."
    ),
    "F35_E_swift_rejected_list_of_texts.jsonl": in_chatml(
        chatml(("user", "Name a sea.")), "Baltic.", "A cup.", "A hat.", pairs=((0, 1), (0, 2))
    ),
    "F36_M_sequence_of_dict.parquet": Right(groups=((None, (None, None)),), tokenizer="chatml"),
    "F37_N3_swift_kto.jsonl": Right(groups=((asked("Name a fruit."), (" A pear.",)),), pairs=()),
    "F37_N4_lf_kto_alpaca.jsonl": Right(
        groups=((asked("Name a fruit."), (" A pear.",)),), pairs=()
    ),
    "F37_N_kto_label_int.jsonl": Right(groups=(("Name a fruit.", ("A pear.",)),), pairs=()),
    "F39_AA_pandas_columns.json": Right(
        groups=(("Name a fruit: ", ("pear", "brick")),),
        refused=("orient='records'", "lines=True"),
    ),
    "F39_AA_pretty.json": Right(groups=(("a", ("b", "c")),)),
    "F39_AA_wrapped.json": Right(groups=(("a", ("b", "c")),)),
    "F39_CC.arrow": Right(groups=((None, (None, None)),) * 2),
    "F39_CC.csv": Right(refused=("CSV", "to_json")),
    "F41_G4_tools_list_of_json_texts.jsonl": Right(
        groups=((None, (None, None)),), says=("dropped  nothing",), tokenizer="qwen3"
    ),
    "F15_T4_eos_behind_template_end.jsonl": Right(
        groups=((None, ("hello<|im_end|>\n", "go<|im_end|>\n")),),
        tokenizer="r_qwen25base",
        exact=True,
    ),
    "F17_KK_boundary_spaces.jsonl": Right(
        groups=(
            ("Answer with yes or no: ", ("yes<|endoftext|>", "no<|endoftext|>")),
            ("Answer with yes or no:", (" yes<|endoftext|>", " no<|endoftext|>")),
            ("2+2=", ("4<|endoftext|>", "44<|endoftext|>")),
        ),
        tokenizer="gpt2like",
        exact=True,
    ),
    "F38_O2_truncate_prompt.jsonl": Right(
        groups=(
            (
                re.compile(
                    r"<\|im_start\|>system\nBe kind\.<\|im_end\|>\n<\|im_start\|>user\n"
                    r".*fruit\.<\|im_end\|>\n<\|im_start\|>assistant\n"
                ),
                ("A pear.", "A brick."),
            ),
        ),
        tokenizer="chatml",
        flags=("--max-length", "100", "--overflow", "truncate-prompt"),
    ),
}
"""File -> what is right; None is any text."""


@pytest.fixture(scope="session")
def cases() -> Path:
    """The folder of cases, beside that of the real data."""
    data = Path(os.environ.get("MEGATRON_PREFIX_DATA", ROOT.parent / "shared" / "data"))
    path = data.resolve().parent / "cases" / "data"
    if not path.is_dir():
        pytest.skip(f"no cases in {path}: set MEGATRON_PREFIX_DATA to the folder beside `cases`")
    return path


@pytest.fixture(scope="session")
def tokenizers(cases, tmp_path_factory) -> Path:
    """The tokenizers of the cases, made by their own script."""
    if find_spec("trl") is None:
        pytest.skip("TRL, whose chat templates the cases use, is not installed: pip install trl")
    out = tmp_path_factory.mktemp("tokenizers")
    command = [sys.executable, str(cases / "make_tokenizers.py"), str(out)]
    subprocess.run(command, check=True, capture_output=True)
    return out


def test_every_case_is_tried(cases):
    assert {p.name for p in cases.glob("F*")} == CASES.keys()


@pytest.mark.parametrize("name", CASES)
def test_case(name, cases, request, tmp_path, capsys):
    right = CASES[name]
    tokenizer = right.tokenizer
    if tokenizer != "bytes":
        tokenizer = str(request.getfixturevalue("tokenizers") / tokenizer)
    output = tmp_path / "out" / "set"
    flags = ["--input", str(cases / name), "--tokenizer", tokenizer, *right.flags]
    code = main(["build", *flags, "--output", str(output)])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    if code == 2 and right.refused:
        assert all(words in err for words in right.refused), err
        assert not output.parent.exists()
        return
    assert code == 0, err
    dataset, words = PreferenceDataset(output), load_tokenizer(tokenizer)
    assert len(dataset) == len(right.groups), "a case that must be refused was built"
    for tree, (prompt, responses) in zip(dataset, right.groups, strict=True):
        assert tree.num_responses == len(responses)
        assert [tuple(pair) for pair in tree.pairs.tolist()] == list(right.pairs)
        for response, expected in enumerate(responses):
            tokens, start = tree.response_tokens(response)
            before, own = (words.decode(ids.tolist()) for ids in (tokens[:start], tokens[start:]))
            if not right.exact:
                before, own = BEGINS.sub("", before), ENDS.sub("", own)
            for text, wanted in ((before, prompt), (own, expected)):
                if isinstance(wanted, re.Pattern):
                    assert wanted.fullmatch(text), text
                else:
                    assert wanted is None or text == wanted
    assert all(words in out for words in right.says), out
