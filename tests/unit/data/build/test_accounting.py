"""The build report of the real sets: all that was dropped, cut and noted is counted again.

Nothing of the package reads the records here: the standard library counts bytes, and the byte
tokenizer adds one token before them and one after them.
"""

import gzip
import json
import re
from collections import Counter

import pytest

from megatron_prefix.data.build import BuildOptions, build_dataset
from megatron_prefix.data.store.dataset import PreferenceDataset

TURN = "\n\nAssistant:"
LIMIT = 900
MARKS = {"human": "\n\nHuman: ", "gpt": "\n\nAssistant: ", "system": "\n\nSystem: "}


def rows(path):
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def shared_start(a, b):
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


def hh_pairs(row):
    """(prompt, chosen, rejected, parts early) of a record of HH-RLHF."""
    chosen, rejected = row["chosen"], row["rejected"]
    cut = chosen.rfind(TURN, 0, shared_start(chosen, rejected)) + len(TURN)
    early = TURN in chosen[cut:] or TURN in rejected[cut:]
    return chosen[:cut], chosen[cut:], rejected[cut:], early


def chat_pairs(row):
    prompt = "".join(MARKS[turn["from"]] + turn["value"] for turn in row["conversations"])
    answers = (f" {row[name]['value']}" for name in ("chosen", "rejected"))
    return prompt + TURN, *answers, False


def oasst_sets(node, text=""):
    """(prompt, [(rank, response)]) of every set of ranked siblings below a message."""
    mark = MARKS["human" if node["role"] == "prompter" else "gpt"]
    text += mark + node["text"]
    below = [reply for reply in node["replies"] if reply["role"] == "assistant"]
    ranked = [(r["rank"], " " + r["text"]) for r in below if r.get("rank") is not None]
    own = [(text + TURN, ranked)] if len({rank for rank, _ in ranked}) > 1 else []
    return own + [item for reply in node["replies"] for item in oasst_sets(reply, text)]


def length(*parts):
    return len("".join(parts).encode()) + 2


def build(tmp_path, path, **options):
    report = build_dataset([path], "bytes", tmp_path / "out", BuildOptions(**options))
    return report.as_dict(), PreferenceDataset(tmp_path / "out").manifest["counts"]


PAIRS = {"hh_pairs": hh_pairs, "chat_pairs": chat_pairs}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_dropped_and_noted(name, data_dir, tmp_path):
    path = data_dir / f"{name}.jsonl.gz"
    records = [PAIRS[name](row) for row in rows(path)]
    fits = [max(length(p, c), length(p, r)) <= LIMIT for p, c, r, _ in records]
    report, counts = build(tmp_path, path, max_length=LIMIT, overflow="drop")
    assert 0 < fits.count(False) < len(records), "the limit must drop some"
    dropped = report["dropped"]
    assert list(dropped) == ["over --max-length"]
    assert dropped["over --max-length"]["groups"] == fits.count(False)
    listed = [f"{path.name}:{i + 1}" for i, fit in enumerate(fits) if not fit]
    assert dropped["over --max-length"]["records"] == listed[:1000]
    assert counts["groups"] == counts["pairs"] == fits.count(True)
    fitting = [record for record, fit in zip(records, fits, strict=True) if fit]
    assert note(report, "before the last turn") == sum(early for *_, early in fitting)
    assert note(report, "white space only") == sum(not x.strip() for r in fitting for x in r[1:3])
    repeated = Counter(record[:3] for record in fitting)
    assert report["duplicates"]["num_records"] == sum(n - 1 for n in repeated.values())


def note(report, words):
    return sum(count for text, count in report["notes"].items() if words in text)


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_truncated(name, data_dir, tmp_path):
    path = data_dir / f"{name}.jsonl.gz"
    groups = responses = tokens = hopeless = 0
    for prompt, chosen, rejected, _ in map(PAIRS[name], rows(path)):
        sides = (chosen, rejected)
        longest = max(length(prompt, side) for side in sides)
        if longest <= LIMIT:
            continue
        room = LIMIT - longest + length(prompt)
        cut = next((text for text in shorter(prompt) if length(text) <= room), None)
        if cut is None:
            hopeless += 1
        else:
            groups, responses = groups + 1, responses + 2
            tokens += 2 * (length(prompt) - length(cut))
    report, counts = build(tmp_path, path, max_length=LIMIT, overflow="truncate-prompt")
    assert groups > 0
    assert report["truncated"] == {"groups": groups, "responses": responses, "tokens": tokens}
    reason = report["dropped"].get("over --max-length with the shortest prompt", {"groups": 0})
    assert reason["groups"] == hopeless and set(report["dropped"]) <= {
        "over --max-length with the shortest prompt"
    }
    assert counts["groups"] == len(rows(path)) - hopeless


HEADER = re.compile(r"(\n\n(?:Human|Assistant|System): ?)")


def shorter(prompt):
    """The prompt without more and more of its oldest text, turn by turn.

    The text of the oldest user's turn goes first, then this turn with the answers to it. Of the
    last question and what follows it, every turn keeps a character.
    """
    front, *parts = HEADER.split(prompt)
    turns = [list(turn) for turn in zip(parts[::2], parts[1::2], strict=True)]
    if turns[0][0].startswith(MARKS["system"].rstrip()):
        front += "".join(turns.pop(0))

    def joined():
        return front + "".join(header + text for header, text in turns)

    while sum(turn[0].startswith("\n\nHuman") for turn in turns) > 1:
        while len(turns[0][1]) > 1:
            turns[0][1] = turns[0][1][1:]
            yield joined()
        del turns[0]
        while not turns[0][0].startswith("\n\nHuman"):
            del turns[0]
        yield joined()
    for turn in turns:
        while len(turn[1]) > 1:
            turn[1] = turn[1][1:]
            yield joined()


def test_trees_dropped(data_dir, tmp_path):
    path = data_dir / "oasst_trees.jsonl.gz"
    limit = 1500
    kept_responses = kept_pairs = kept_groups = lost_responses = lost_pairs = unpaired = 0
    blank = lost_groups = 0
    for row in rows(path):
        sets = oasst_sets(row["prompt"])
        fits = [[length(p, text) <= limit for _, text in ranked] for p, ranked in sets]
        pairs, left = [], []
        for (_, ranked), fit in zip(sets, fits, strict=True):
            labelled = [
                (i, j) for i, a in enumerate(ranked) for j, b in enumerate(ranked) if a[0] < b[0]
            ]
            pairs.append(labelled)
            left.append([(i, j) for i, j in labelled if fit[i] and fit[j]])
        if not any(left):
            lost_groups += 1
            continue
        kept_groups += 1
        blank += sum(not text.strip() for _, ranked in sets for _, text in ranked)
        kept_pairs += sum(map(len, left))
        lost_pairs += sum(map(len, pairs)) - sum(map(len, left))
        for (_, ranked), fit, left_pairs in zip(sets, fits, left, strict=True):
            paired = {i for pair in left_pairs for i in pair}
            kept_responses += len(paired)
            lost_responses += fit.count(False)
            unpaired += len(ranked) - fit.count(False) - len(paired)
    report, counts = build(tmp_path, path, max_length=limit, overflow="drop")
    assert (counts["groups"], counts["responses"], counts["pairs"]) == (
        kept_groups,
        kept_responses,
        kept_pairs,
    )
    over = report["dropped"]["over --max-length"]
    assert 0 < lost_responses
    assert (over["groups"], over["responses"], over["pairs"]) == (
        lost_groups,
        lost_responses,
        lost_pairs,
    )
    left_over = report["dropped"].get("left without a pair", {"responses": 0})
    assert left_over["responses"] == unpaired and note(report, "white space") == blank


NOTED = ("last turn", "white space", "left out")


@pytest.mark.parametrize("name", [*PAIRS, "oasst_trees"])
def test_nothing_else_happens_to_a_real_set(name, data_dir, tmp_path):
    report, counts = build(tmp_path, data_dir / f"{name}.jsonl.gz")
    assert report["dropped"] == {} and report["wrong"]["num_records"] == 0
    assert report["truncated"] == {"groups": 0, "responses": 0, "tokens": 0}
    assert counts["groups"] == report["num_records"] == len(rows(data_dir / f"{name}.jsonl.gz"))
    assert all(any(words in text for words in NOTED) for text in report["notes"])


def answers(node):
    """Assistant messages of a tree."""
    below = node["replies"] or []
    return (node["role"] == "assistant") + sum(map(answers, below))


def test_answers_that_are_not_responses_are_counted(data_dir, tmp_path):
    path = data_dir / "oasst_trees.jsonl.gz"
    report, counts = build(tmp_path, path)
    left_out = sum(answers(row["prompt"]) for row in rows(path)) - counts["responses"]
    assert left_out > 0 and note(report, "left out") == left_out


def test_prompts_of_a_real_set_that_repeat_are_merged(data_dir, tmp_path):
    path = data_dir / "hh_pairs.jsonl.gz"
    prompts = Counter(hh_pairs(row)[0] for row in rows(path))
    report, counts = build(tmp_path, path, merge_prompts=True)
    assert counts["groups"] == report["merged"]["groups"] == len(prompts)
    assert report["merged"]["records"] == counts["pairs"] == sum(prompts.values())
    sizes = PreferenceDataset(tmp_path / "out").group_num_records
    assert sorted(sizes.tolist()) == sorted(prompts.values())
