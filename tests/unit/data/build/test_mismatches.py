"""`build --kto`: which responses become mismatches, and what becomes of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from megatron_prefix.__main__ import main
from megatron_prefix.data.build import BuildOptions, build_dataset, mismatches
from megatron_prefix.data.build.merge_parts import merge_datasets
from megatron_prefix.data.inspect import survey, tree_dict, tree_text
from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.data.store.roles import mismatched_responses, own_responses
from megatron_prefix.data.store.verify import verify_dataset
from megatron_prefix.data.tokenize.tokenizers import load_tokenizer
from megatron_prefix.errors import InputError


def records(count: int, prompts: int) -> list[dict]:
    return [
        {
            "prompt": f"Question {i % prompts}?",
            "completion": f" Answer {i} {'long ' * (i % 5)}.",
            "label": i % 2 == 0,
        }
        for i in range(count)
    ]


def built(folder: Path, name: str, rows: list[dict], **options) -> PreferenceDataset:
    source = folder / f"{name}.jsonl"
    source.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    build_dataset([source], "bytes", folder / name, BuildOptions(kto=True, **options))
    dataset = PreferenceDataset(folder / name)
    verify_dataset(dataset)
    return dataset


def texts(dataset: PreferenceDataset, group: int) -> list[tuple[str, str]]:
    """(prompt, response) of every response of a group."""
    tokenizer, tree = load_tokenizer("bytes"), dataset[group]
    pairs = []
    for response in range(tree.num_responses):
        tokens, start = tree.response_tokens(response)
        pairs.append(tuple(tokenizer.decode(x.tolist()) for x in (tokens[:start], tokens[start:])))
    return pairs


def mismatch(dataset: PreferenceDataset, group: int) -> str:
    """The text of a group's mismatch."""
    r0, r1 = dataset.group_responses[group : group + 2]
    (place,) = np.flatnonzero(dataset.response_roles[r0:r1])
    assert place == r1 - r0 - 1, "the mismatch is the last response"
    prompt, text = texts(dataset, group)[place]
    assert prompt == texts(dataset, group)[0][0]
    return text


def test_every_group_gets_the_next_answer_to_another_prompt(tmp_path):
    rows = records(23, 7)
    dataset = built(tmp_path, "a", rows)
    order = np.random.default_rng([1234, 23]).permutation(23).tolist()
    for place, group in enumerate(order):
        later = [order[(place + i) % 23] for i in range(1, 23)]
        donor = next(g for g in later if rows[g]["prompt"] != rows[group]["prompt"])
        assert mismatch(dataset, group) == f"{rows[donor]['completion']}<eos>"
    assert dataset.manifest["counts"]["mismatches"] == 23
    assert dataset.manifest["options"]["kto_seed"] == 1234


def test_workers_do_not_matter_and_the_seed_does(tmp_path, monkeypatch):
    monkeypatch.setattr(mismatches, "GROUPS", 4)
    rows = records(23, 7)
    one = built(tmp_path, "one", rows)
    assert built(tmp_path, "two", rows, workers=2).fingerprint == one.fingerprint
    assert built(tmp_path, "seed", rows, kto_seed=1).fingerprint != one.fingerprint
    own = built(tmp_path, "merged", rows, merge_prompts=True)
    assert (
        own.fingerprint
        == built(tmp_path, "merged2", rows, merge_prompts=True, workers=2).fingerprint
    )


def test_after_merging_and_within_each_output(tmp_path):
    rows = records(40, 12)
    built(tmp_path, "a", rows, merge_prompts=True, holdout=0.4)
    sides = [PreferenceDataset(tmp_path / name) for name in ("a", "a_valid")]
    prompts = []
    for dataset in sides:
        answers = {row["completion"]: row["prompt"] for row in rows}
        own = {texts(dataset, g)[0][0].removeprefix("<bos>") for g in range(len(dataset))}
        prompts.append(own)
        for group in range(len(dataset)):
            donor = answers[mismatch(dataset, group).removesuffix("<eos>")]
            assert donor in own, "the answer is of the same output"
            assert donor != texts(dataset, group)[0][0].removeprefix("<bos>")
    assert not prompts[0] & prompts[1]


def test_one_that_does_not_fit_is_passed_over(tmp_path):
    rows = records(23, 7)
    most = 1 + len("Question 0?") + len(" Answer 10 long .") + 1
    dataset = built(tmp_path, "a", rows, max_length=most, overflow="drop")
    assert int(np.asarray(dataset.response_lengths).max()) <= most
    free = built(tmp_path, "b", rows)
    assert len(dataset) < len(free) and dataset.manifest["counts"]["mismatches"] == len(dataset)


def test_a_mismatch_follows_a_shortened_prompt(tmp_path):
    """The prompts are cut to fit, and the mismatch follows what is left of them."""
    rows = [
        {"prompt": f"{'word ' * (8 + i)}{i}?", "completion": f" Answer {i}.", "label": True}
        for i in range(6)
    ]
    dataset = built(tmp_path, "a", rows, max_length=30, overflow="truncate-prompt")
    for group in range(6):
        assert mismatch(dataset, group).startswith(" Answer ")
        assert texts(dataset, group)[0][0].endswith(f"{group}?")


def test_one_prompt_has_none(tmp_path):
    with pytest.raises(InputError, match="--kto: no group of .* the response of another prompt"):
        built(tmp_path, "a", records(4, 1))
    assert not list(tmp_path.glob("a.*[!l]"))
    with pytest.raises(InputError, match="--kto-seed is -1: give at least 0"):
        BuildOptions(kto=True, kto_seed=-1)


def test_pairs_and_conversations(tmp_path):
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Question {i}?"}],
            "chosen": [{"role": "assistant", "content": f"Good {i}"}],
            "rejected": [{"role": "assistant", "content": f"Bad {i}"}],
        }
        for i in range(5)
    ]
    dataset = built(tmp_path, "a", rows)
    own = own_responses(dataset)
    assert np.diff(own.group_responses).tolist() == [2] * 5
    assert np.diff(dataset.group_pairs).tolist() == [1] * 5
    donors = {mismatch(dataset, group).split()[0] for group in range(5)}
    assert donors == {"Good", "Bad"}, "the place in the order chooses among several"


def test_they_are_counted_apart(tmp_path, capsys):
    rows = records(9, 5)
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    flags = ["--input", str(source), "--tokenizer", "bytes"]
    assert main(["build", *flags, "--output", str(tmp_path / "plain")]) == 0
    plain = capsys.readouterr().out
    assert main(["build", *flags, "--output", str(tmp_path / "kto"), "--kto"]) == 0
    summary = capsys.readouterr().out
    assert re.search("mismatches +9 ", summary) and "mismatches" not in plain
    assert "responses   9" in summary
    assert main(["inspect", str(tmp_path / "kto")]) == 0
    assert re.search("mismatches +9 ", capsys.readouterr().out)
    sets = [PreferenceDataset(tmp_path / name) for name in ("plain", "kto")]
    surveys = [survey(x, 100) for x in sets]
    for key in ("tokens", "lengths", "histograms", "packing", "responses_per_set"):
        assert surveys[0].get(key) == surveys[1].get(key), key
    text = tree_text(sets[1], 0)
    assert "1 response, 0 pairs, 1 mismatch of another prompt" in text
    assert [x["is_mismatch"] for x in tree_dict(sets[1], 0)["responses"]] == [False, True]
    code = main(["build", *flags, "--output", str(tmp_path / "other"), "--kto-seed", "3"])
    assert code == 2 and "--kto-seed 3 has no effect without --kto" in capsys.readouterr().err


def test_merge_keeps_them(tmp_path):
    parts = [built(tmp_path, str(i), records(6, 3 + i)) for i in range(2)]
    merge_datasets([tmp_path / "0", tmp_path / "1"], tmp_path / "whole")
    whole = PreferenceDataset(tmp_path / "whole")
    verify_dataset(whole)
    assert whole.manifest["counts"]["mismatches"] == 12
    assert [mismatch(whole, g) for g in range(12)] == [
        mismatch(part, g) for part in parts for g in range(6)
    ]
    assert len(mismatched_responses(whole).response_lengths) == 12
