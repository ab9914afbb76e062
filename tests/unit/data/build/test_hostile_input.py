"""Input that could easily be read in another way, and characters that other programs lose."""

import json

import numpy as np
import pytest

from megatron_prefix.__main__ import main
from megatron_prefix.data.steps.compositions.settings import StepSettings
from megatron_prefix.data.steps.packed.writing import write_packed_steps
from megatron_prefix.data.store.dataset import PreferenceDataset

ROW = '{"prompt": "a", "chosen": "b", "rejected": "c"}'
UNICODE = {
    "emoji": "\U0001f469\u200d\U0001f52c\U0001f3fd",
    "right to left": "\u0645\u0631\u062d\u0628\u0627 \u202eabc\u202c",
    "combining": "e\u0301\u0323 a\u0300",
    "composed": "\u00e9",
    "nul": "a\x00b",
    "controls": "\x1b[31m\r\x7f\u2028\ufeff",
    "private": "\ue000\U0010ffff",
}


def build(capsys, output, *inputs, flags=()):
    named = [part for path in inputs for part in ("--input", str(path))]
    code = main(["build", *named, "--tokenizer", "bytes", "--output", str(output), *flags])
    return code, *capsys.readouterr()


@pytest.mark.parametrize("name", UNICODE)
def test_characters_go_through_build_inspect_and_decode(tmp_path, capsys, name):
    """Byte for byte, not normalised or reordered; control characters are printed escaped."""
    from megatron_prefix.data.tokenize import load_tokenizer

    text = UNICODE[name]
    record = {"prompt": f"{text}?", "chosen": f"{text}!", "rejected": text[::-1] + "."}
    (tmp_path / "in.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    assert build(capsys, tmp_path / "set", tmp_path / "in.jsonl")[0] == 0
    tree = PreferenceDataset(tmp_path / "set")[0]
    tokenizer = load_tokenizer("bytes")
    for response, side in enumerate(("chosen", "rejected")):
        tokens, start = tree.response_tokens(response)
        assert bytes(tokens[1:start].tolist()).decode() == record["prompt"]
        assert bytes(tokens[start:-1].tolist()).decode() == record[side]
        assert tokenizer.decode(tokens[start:-1].tolist()) == record[side]
    assert main(["inspect", str(tmp_path / "set"), "--verify", "--tree", "0"]) == 0
    out = capsys.readouterr().out
    assert not set(out) & set("\x00\x1b\r\x7f\u202e\u2028\ufeff")
    assert main(["inspect", str(tmp_path / "set"), "--tree", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tree"]["nodes"][0]["tokens"][0] == 256


@pytest.mark.parametrize("half", ["\\ud83d", "\\ude00", "x\\ude00\\ud83d"])
def test_half_a_character_is_refused_with_its_line(tmp_path, capsys, half):
    (tmp_path / "in.jsonl").write_text(f"{ROW}\n{ROW.replace('b', half, 1)}\n")
    code, _, err = build(capsys, tmp_path / "o" / "set", tmp_path / "in.jsonl")
    assert code == 2 and "in.jsonl, line 2" in err and "surrogate" in err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "text",
    [
        '{"prompt": "a", "prompt": "z", "chosen": "b", "rejected": "c"}\n',
        '[{"prompt": "a", "chosen": "b", "rejected": "c", "more": {"prompt": 1, "prompt": 2}}]',
    ],
)
def test_a_name_that_occurs_twice_is_refused(tmp_path, capsys, text):
    (tmp_path / "in.json").write_text(text)
    code, _, err = build(capsys, tmp_path / "o" / "set", tmp_path / "in.json")
    assert code == 2 and "in.json, line 1" in err and "the name 'prompt' twice" in err
    assert not (tmp_path / "o").exists()


def test_input_that_is_named_twice_is_read_twice(tmp_path, capsys):
    """`--input A --input B` is `--input A B`, not B alone."""
    for name in "ab":
        (tmp_path / name).write_text(ROW.replace("b", name) + "\n")
    assert build(capsys, tmp_path / "set", tmp_path / "a", tmp_path / "b")[0] == 0
    assert len(PreferenceDataset(tmp_path / "set")) == 2


def test_map_to_a_column_that_nothing_reads_is_refused(tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text(ROW + "\n")
    flags = ["--map", "chosne=chosen"]
    code, _, err = build(capsys, tmp_path / "set", tmp_path / "in.jsonl", flags=flags)
    assert code == 2 and "no format reads a column 'chosne'" in err


def test_a_directory_of_files_that_differ_is_refused(tmp_path, capsys):
    pytest.importorskip("datasets")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text(ROW + "\n")
    (tmp_path / "in" / "b.jsonl").write_text(ROW[:-1] + ', "more": true}\n')
    code, _, err = build(capsys, tmp_path / "o" / "set", tmp_path / "in")
    assert code == 2 and "cannot be read after row 1" in err and "Traceback" not in err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("output", ["", ".", "..", "a\0b"])
def test_outputs_that_name_no_file_are_refused(tmp_path, capsys, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text(ROW + "\n")
    code, _, err = build(capsys, output, tmp_path / "in.jsonl")
    assert code == 2 and "names no file" in err
    code, _, err = build(capsys, output, tmp_path / "in.jsonl", flags=["--merge-prompts"])
    assert code == 2 and "names no file" in err
    assert build(capsys, "set", tmp_path / "in.jsonl")[0] == 0
    pack = ["pack", "set", "--row-capacity", "99", "--global-batch-size", "2"]
    assert main([*pack, "--output", output]) == 2
    assert "names no folder" in capsys.readouterr().err
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(("size", "whole"), [(2, 3), (4, 1), (6, 1), (7, 0), (10**12, 0)])
def test_a_batch_larger_than_all_records_is_one_step_that_is_not_whole(tmp_path, size, whole):
    """Of any size: nothing of its size is allocated."""
    (tmp_path / "in.jsonl").write_text((ROW + "\n") * 3)
    assert (
        main(
            ["build", "--input", str(tmp_path / "in.jsonl"), "--tokenizer", "bytes", "--output"]
            + [str(tmp_path / "set")]
        )
        == 0
    )
    settings = StepSettings(seed=0, row_capacity=99, global_batch_size=size, epochs=2)
    manifest = write_packed_steps(PreferenceDataset(tmp_path / "set"), settings, tmp_path / "plan")
    assert manifest["counts"]["whole_steps"] == whole
    assert manifest["counts"]["steps"] == -(-6 // size)
    assert np.load(tmp_path / "plan" / "groups.npy").shape == (6,)
