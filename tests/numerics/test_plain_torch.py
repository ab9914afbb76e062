"""A loop in plain torch as a judge: transformers' model, one sequence at a time, DPO by hand.

`plain_run` and what feeds it know nothing of the package: they read the records themselves, cut
prompts, list pairs, and call the model once a response. Six full-batch steps, to be followed by
the packed, shared run on the same file.
"""

from __future__ import annotations

import gzip
import itertools
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from megatron_prefix.config import parse_config
from megatron_prefix.data.build.builder import build_dataset
from megatron_prefix.train.run import train

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))

from trl_common import make_model  # noqa: E402

STEPS, LEARNING_RATE, BETA = 6, 3e-4, 0.2
TOLERANCE = 1e-4
MARKERS = {"prompter": "\n\nHuman:", "assistant": "\n\nAssistant:"}
pytestmark = pytest.mark.filterwarnings("ignore")


@dataclass(frozen=True)
class ComparisonSet:
    """A prompt, its responses, and (chosen, rejected) indices of the pairs."""

    prompt: str
    responses: list[str]
    pairs: list[tuple[int, int]]


def sets_of_dialogues(record: dict) -> list[ComparisonSet]:
    """Two dialogues that share all but the assistant's last turn."""
    cut = record["chosen"].rindex(MARKERS["assistant"]) + len(MARKERS["assistant"])
    prompt = record["chosen"][:cut]
    sides = [record[name] for name in ("chosen", "rejected")]
    assert all(side.startswith(prompt) for side in sides) and sides[0] != sides[1]
    return [ComparisonSet(prompt, [side[cut:] for side in sides], [(0, 1)])]


def sets_of_tree(record: dict) -> list[ComparisonSet]:
    """One set for every message with ranked answers; every two answers are a pair."""
    sets = []

    def visit(node: dict, before: str) -> None:
        text = f"{before}{MARKERS[node['role']]} {node['text']}"
        replies = node.get("replies", [])
        if node["role"] == "prompter":
            ranked = [r for r in replies if r.get("rank") is not None]
            ranked.sort(key=lambda reply: reply["rank"])
            assert len({reply["rank"] for reply in ranked}) == len(ranked)
            responses = [f" {reply['text']}" for reply in ranked]
            pairs = list(itertools.combinations(range(len(ranked)), 2))
            if pairs:
                sets.append(ComparisonSet(text + MARKERS["assistant"], responses, pairs))
        for reply in replies:
            visit(reply, text)

    visit(record["prompt"], "")
    return sets


def plain_run(
    directory: Path, sets: list[ComparisonSet], by_set: bool = False
) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step. `by_set`: a set weighs 1, and not each of its pairs."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)

    def logps(group: ComparisonSet) -> torch.Tensor:
        return torch.stack([logp(group.prompt, response) for response in group.responses])

    def logp(prompt: str, response: str) -> torch.Tensor:
        before, after = (tokenizer(text)["input_ids"] for text in (prompt, response))
        tokens = torch.tensor([before + after + [tokenizer.eos_token_id]])
        logps = model(tokens[:, :-1]).logits.log_softmax(-1)
        return logps[0].gather(1, tokens[0, 1:, None])[len(before) - 1 :].double().sum()

    with torch.no_grad():
        reference = [logps(group) for group in sets]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
    )
    total = len(sets) if by_set else sum(len(group.pairs) for group in sets)
    history = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        value = 0.0
        for group, base in zip(sets, reference, strict=True):
            rewards = BETA * (logps(group) - base)
            margins = torch.stack([rewards[c] - rewards[r] for c, r in group.pairs])
            losses = -torch.nn.functional.logsigmoid(margins)
            loss = (losses.mean() if by_set else losses.sum()) / total
            loss.backward()
            value += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        optimizer.step()
        history.append((value, norm))
    return history


def our_run(directory: Path, records: list[dict], folder: Path, **loss: str) -> list[dict]:
    """Lines of metrics of the packed, shared run over the same records, all in every step."""
    lines = [json.dumps(record) + "\n" for record in records]
    (folder / "records.jsonl").write_text("".join(lines), encoding="utf-8")
    build_dataset([folder / "records.jsonl"], str(directory), folder / "set")
    data = {"train": str(folder / "set"), "sharing": "tree", "row_capacity": 8192}
    config = parse_config(
        {
            "data": {**data, "global_batch_size": len(records)},
            "model": {"hf": str(directory)},
            "loss": {"beta": BETA, **loss},
            "optimizer": {"lr": LEARNING_RATE, "clip_grad": 1.0},
            "train": {"steps": STEPS},
            "logging": {"output": str(folder / "run")},
        }
    )
    train(config)
    text = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def assert_followed(ours: list[dict], plain: list[tuple[float, float]]) -> None:
    """Loss and gradient norm of all steps, of runs that learn and share."""
    assert len(ours) == len(plain) == STEPS
    for row, (loss, norm) in zip(ours, plain, strict=True):
        assert abs(row["loss"] - loss) < TOLERANCE * loss, (row, loss)
        assert abs(row["grad_norm"] - norm) < TOLERANCE * norm, (row, norm)
    assert abs(plain[0][0] - math.log(2)) < 1e-6 and plain[-1][0] < 0.65
    assert plain[0][1] > 1.0, "clipping is never at work"
    assert all(row["tokens/executed"] < 0.9 * row["tokens/logical"] for row in ours)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
    return make_model(tmp_path_factory.mktemp("model"), **sizes, initializer_range=0.12)


def read(path: Path) -> Iterator[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def made_text(rng: np.random.Generator, letters: str = "abcdefgh éß") -> str:
    return "".join(rng.choice([*letters], rng.integers(5, 40)))


def made_dialogue(rng: np.random.Generator) -> dict:
    """Chosen and rejected have letters of their own, after a word that both begin with."""
    turns = [MARKERS[role] + " " + made_text(rng) for role in ("prompter", "assistant", "prompter")]
    prompt = "".join(turns) + MARKERS["assistant"] + " well "
    return {"chosen": prompt + made_text(rng, "abc"), "rejected": prompt + made_text(rng, "fgh")}


def made_tree(rng: np.random.Generator) -> dict:
    """Three ranked answers; the best of them is asked on and gets another two."""

    def answers(*ranks: int) -> list[dict]:
        texts = [made_text(rng, ("abc", "cdef", "fgh")[rank]) for rank in ranks]
        return [
            {"role": "assistant", "text": text, "rank": rank, "replies": []}
            for text, rank in zip(texts, ranks, strict=True)
        ]

    first = answers(2, 0, 1)
    question = {"role": "prompter", "text": made_text(rng), "replies": answers(0, 1)}
    first[1]["replies"] = [question]
    return {"prompt": {"role": "prompter", "text": made_text(rng), "replies": first}}


def short_dialogues(path: Path) -> list[dict]:
    """The first 16 pairs of at most 250 bytes that differ in the last turn only."""

    def fits(record: dict) -> bool:
        sides = [record[name] for name in ("chosen", "rejected")]
        prompts = [side[: side.rindex(MARKERS["assistant"])] for side in sides]
        long = max(len(side.encode()) for side in sides) > 250
        return not long and sides[0] != sides[1] and prompts[0] == prompts[1]

    return list(itertools.islice(filter(fits, read(path)), 16))


def small_trees(path: Path) -> list[dict]:
    """The four smallest trees with several comparison sets."""

    def size(record: dict) -> int:
        sets = sets_of_tree(record)
        return sum(len(group.prompt) + len(text) for group in sets for text in group.responses)

    def is_ranked(record: dict) -> bool:
        try:
            return len(sets_of_tree(record)) > 1
        except AssertionError:  # ties
            return False

    return sorted(filter(is_ranked, read(path)), key=size)[:4]


@pytest.fixture(params=["real", "made"])
def dialogues(request) -> list[dict]:
    if request.param == "real":
        return short_dialogues(request.getfixturevalue("data_dir") / "hh_pairs.jsonl.gz")
    rng = np.random.default_rng(3)
    return [made_dialogue(rng) for _ in range(16)]


@pytest.fixture(params=["real", "made"])
def trees(request) -> list[dict]:
    if request.param == "real":
        return small_trees(request.getfixturevalue("data_dir") / "oasst_trees.jsonl.gz")
    rng = np.random.default_rng(4)
    return [made_tree(rng) for _ in range(4)]


def test_pairs_follow_the_plain_loop(dialogues, model, tmp_path):
    assert len(dialogues) == 16
    plain = plain_run(model, [s for record in dialogues for s in sets_of_dialogues(record)])
    assert_followed(our_run(model, dialogues, tmp_path), plain)


@pytest.mark.parametrize("weighting", ["pair", "group"])
def test_trees_follow_the_plain_loop(weighting, trees, model, tmp_path):
    """Responses serve several pairs, sets have one to three of them."""
    sets = [s for record in trees for s in sets_of_tree(record)]
    sizes = {len(group.pairs) for group in sets}
    assert len(trees) == 4 and len(sets) >= 8 and len(sizes) > 1, sizes
    plain = plain_run(model, sets, by_set=weighting == "group")
    assert_followed(our_run(model, trees, tmp_path, weighting=weighting), plain)


def test_weighting_and_labels_make_another_run(model, tmp_path):
    """So the comparison can fail."""
    rng = np.random.default_rng(4)
    trees = [made_tree(rng) for _ in range(4)]
    sets = [s for record in trees for s in sets_of_tree(record)]
    ours = our_run(model, trees, tmp_path)
    first = ComparisonSet(sets[0].prompt, sets[0].responses, [(1, 0), *sets[0].pairs[1:]])
    for other in (plain_run(model, sets, by_set=True), plain_run(model, [first, *sets[1:]])):
        with pytest.raises(AssertionError):
            assert_followed(ours, other)
