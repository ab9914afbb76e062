"""`build --holdout`: two data sets of one build, with no prompt in both."""

import json

import numpy as np
import pytest

from megatron_prefix.__main__ import main
from megatron_prefix.data.build import BuildOptions, build_dataset, merge_datasets
from megatron_prefix.data.build.duplicates import is_held_out
from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.data.store.verify import verify_dataset
from megatron_prefix.errors import InputError


def records(numbers, per_prompt=2):
    return [
        {"prompt": f"Name {n}:", "chosen": f" yes {i}", "rejected": f" no {i}"}
        for n in numbers
        for i in range(per_prompt)
    ]


def write_records(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(prefix):
    """(prompt, chosen) of every pair of a data set of bytes, with how often each occurs."""
    dataset, result = PreferenceDataset(prefix), []
    for group in range(len(dataset)):
        tree = dataset[group]
        for chosen, _ in tree.pairs.tolist():
            tokens, start = tree.response_tokens(chosen)
            parts = (tokens[1:start], tokens[start:-1])
            result.append(tuple(bytes(part.tolist()).decode() for part in parts))
    return result


def build(folder, name, rows, **options):
    source = write_records(folder / f"{name}.jsonl", rows)
    report = build_dataset([source], "bytes", folder / name, BuildOptions(**options))
    return report, texts(folder / name), texts(folder / f"{name}_valid")


@pytest.mark.parametrize("merge", [False, True])
def test_every_record_is_on_one_side_and_no_prompt_on_both(tmp_path, merge):
    rows = records(range(300))
    report, train, valid = build(tmp_path, "a", rows, holdout=0.2, merge_prompts=merge)
    assert sorted(train + valid) == sorted((row["prompt"], row["chosen"]) for row in rows)
    assert not {prompt for prompt, _ in train} & {prompt for prompt, _ in valid}
    prompts = {prompt for prompt, _ in valid}
    assert 0.12 < len(prompts) / 300 < 0.28
    for name in ("a", "a_valid"):
        verify_dataset(PreferenceDataset(tmp_path / name))
    held = report.valid_manifest["counts"]["groups"]
    assert held == len(prompts) * (1 if merge else 2)
    assert f"held out  {held:,} of {300 if merge else 600:,} groups" in report.summary()
    options = PreferenceDataset(tmp_path / "a_valid").manifest["options"]
    assert (options["holdout"], options["part"]) == (0.2, "valid")


def test_no_record_changes_sides_when_others_are_added(tmp_path):
    _, train, valid = build(tmp_path, "few", records(range(0, 200, 2)), holdout=0.3)
    _, more_train, more_valid = build(
        tmp_path, "many", records(reversed(range(200)), per_prompt=3), holdout=0.3
    )
    assert set(train) <= set(more_train) and set(valid) <= set(more_valid)
    _, _, wider = build(tmp_path, "wide", records(range(0, 200, 2)), holdout=0.5)
    assert set(valid) < set(wider)
    _, _, other = build(tmp_path, "seed", records(range(0, 200, 2)), holdout=0.3, holdout_seed=5)
    assert set(other) != set(valid)


def test_the_share_is_that_of_the_prompts():
    held = [is_held_out(prompt, 0.02, 0) for prompt in range(-10000, 10000)]
    assert abs(np.mean(held) - 0.02) < 0.004
    assert held != [is_held_out(prompt, 0.02, 1) for prompt in range(-10000, 10000)]


def test_workers_and_parts_give_the_same_files(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_prefix.data.build.chunks.CHUNK", 16)
    rows = records(range(90))
    build(tmp_path, "one", rows, holdout=0.3)
    build(tmp_path, "two", rows, holdout=0.3, workers=2)
    build(tmp_path, "first", rows[:100], holdout=0.3)
    build(tmp_path, "last", rows[100:], holdout=0.3)
    for side in ("", "_valid"):
        whole = PreferenceDataset(tmp_path / f"one{side}")
        assert PreferenceDataset(tmp_path / f"two{side}").fingerprint == whole.fingerprint
        parts = [tmp_path / f"{name}{side}" for name in ("first", "last")]
        merged = merge_datasets(parts, tmp_path / f"merged{side}")
        assert merged["fingerprint"] == whole.fingerprint
    with pytest.raises(InputError, match="option part 'valid', .* has 'train'"):
        merge_datasets([tmp_path / "one", tmp_path / "one_valid"], tmp_path / "mixed")


def test_repeated_records_are_counted_on_both_sides(tmp_path):
    report, *_ = build(tmp_path, "a", records(range(20)) * 2, holdout=0.4)
    assert report.duplicates["num_records"] == 40
    assert report.duplicates["records"] == [[40 + i, i] for i in range(40)]


def test_what_cannot_be_split_leaves_nothing(tmp_path, capsys):
    source = write_records(tmp_path / "a.jsonl", records(range(3)))
    arguments = ["build", "--input", str(source), "--tokenizer", "bytes"]
    arguments += ["--output", str(tmp_path / "out" / "a"), "--holdout"]
    assert main([*arguments, "0.0001"]) == 2
    assert "--holdout 0.0001 leaves none of 6 groups for" in capsys.readouterr().err
    assert main([*arguments, "0.9999"]) == 2
    assert "leaves none of 6 groups" in capsys.readouterr().err
    assert main([*arguments, "1.5"]) == 2
    assert "--holdout is 1.5: give a share" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "0.5"]) == 0
    out = capsys.readouterr().out
    assert "a_valid.bin" in out and "held out" in out
