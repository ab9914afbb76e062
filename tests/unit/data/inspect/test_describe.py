import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_sets import inspect

from megatron_prefix.data.build.builder import build_dataset
from megatron_prefix.data.inspect.picture import _runs

ROOT = Path(__file__).resolve().parents[4]


def answer(text, *replies, rank=None, role="assistant"):
    return {"text": text, "role": role, "rank": rank, "replies": list(replies)}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspect")
    deep = answer("Why?", answer("So.", rank=0), answer("Sure", rank=1), role="prompter")
    tree = answer("Hi", answer("Ho", deep, rank=0), answer("Hm\u202e", rank=1), role="prompter")
    flat = answer("x" * 300, answer("a", rank=0), answer("b", rank=1), role="prompter")
    lines = [json.dumps({"prompt": t}) for t in (tree, flat, tree)]
    (folder / "in.jsonl").write_text("\n".join(lines))
    build_dataset([folder / "in.jsonl"], "bytes", folder / "set")
    return folder / "set"


def test_statistics(prefix, capsys):
    code, out, _ = inspect(capsys, prefix)
    assert code == 0
    lines = out.splitlines()
    for words in (["groups", "3"], ["pairs", "5"], ["responses", "10"]):
        assert words in [line.split() for line in lines]
    assert "responses per comparison set (K)  2: 5" in lines
    assert "comparison sets per group  1: 1, 2: 2" in out and "longest path  3: 1, 6: 2" in out
    assert "  duplicates  1 record like an earlier one (kept)" in lines
    assert max(map(len, lines[2:])) <= 100 and "█" in out and "by cost" in out


def test_statistics_as_json(prefix, capsys):
    _, out, _ = inspect(capsys, prefix, "--json", "--verify", "--row-capacity", 400)
    values = json.loads(out)
    stats = values["statistics"]
    assert values["verified"] is True and stats["counts"]["responses"] == 10
    assert stats["factors"]["tree"]["tree"] == 1.0 and stats["factors"]["none"]["tree"] > 1.5
    tokens = stats["counts"]["tokens"]
    assert stats["packing"] == {"row_capacity": 400, "rows": 2, "fill": round(tokens / 800, 4)}


def test_a_tree_as_text(prefix, capsys):
    _, out, _ = inspect(capsys, prefix, "--tree", 0)
    lines = out.splitlines()
    assert lines[0].endswith("9 nodes, 4 responses, 2 pairs")
    assert lines[1].startswith("└─ [0]") and "prompt" in lines[1] and "Human: Hi" in lines[1]
    assert any("loss of 0, 1" in line for line in lines), "' H' is shared by both responses"
    assert any("(2 ends)" in line for line in lines)
    assert "  0 over 1  weight 1  no margin" in lines
    assert "\u202e" not in out and "\\u202e" in out, "marks that turn text around are escaped"


def test_long_text_is_shortened_in_the_middle(prefix, capsys):
    _, out, _ = inspect(capsys, prefix, "--tree", 1)
    assert "xxx … xxx" in out and max(map(len, out.splitlines())) < 160


def test_a_tree_as_json_holds_the_tokens(prefix, capsys):
    from megatron_prefix.data.store.dataset import PreferenceDataset

    _, out, _ = inspect(capsys, prefix, "--tree", 2, "--json")
    tree = json.loads(out)["tree"]
    stored = PreferenceDataset(prefix)[2]
    assert [t for node in tree["nodes"] for t in node["tokens"]] == stored.tokens.tolist()
    assert tree["responses"][2]["nodes"] == stored.response_nodes(2)
    assert tree["record"] == 2 and tree["pairs"][0]["margin"] is None


def test_a_tree_without_its_tokenizer_shows_ids(tmp_path, capsys):
    import sentencepiece

    (tmp_path / "c.txt").write_text("a b c d e f g\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "c.txt"),
        model_prefix=str(tmp_path / "m"),
        vocab_size=12,
        minloglevel=2,
    )
    record = {"prompt": "a b", "chosen": " c", "rejected": " d e f g a b c d e f g"}
    (tmp_path / "in.jsonl").write_text(json.dumps(record))
    build_dataset([tmp_path / "in.jsonl"], str(tmp_path / "m.model"), tmp_path / "set")
    assert "'<s>a b'" in inspect(capsys, tmp_path / "set", "--tree", 0)[1]
    (tmp_path / "m.model").unlink()
    code, out, _ = inspect(capsys, tmp_path / "set", "--tree", 0)
    assert code == 0 and "token ids instead of text" in out and ", …, " in out


def test_a_row_and_its_picture(prefix, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "row.png"
    args = (prefix, "--row", 0, "--row-capacity", 1000, "--picture", path)
    code, out, _ = inspect(capsys, *args)
    assert code == 0 and "3 trees" in out and f"wrote {path}" in out
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
    row = json.loads(inspect(capsys, prefix, "--row", 0, "--row-capacity", 1000, "--json")[1])[
        "row"
    ]
    assert sorted(row["groups"]) == [0, 1, 2] and row["pairs"] == 5 and row["picture"] is None


def test_the_picture_shows_exactly_what_is_visible(prefix):
    """Every (key, query) cell's centre lies in a polygon just where the layout allows it."""
    from matplotlib.path import Path as Outline

    from megatron_prefix.data.inspect.describe import packed_row
    from megatron_prefix.data.inspect.picture import _segment_kinds, _visible_areas
    from megatron_prefix.data.store.dataset import PreferenceDataset

    dataset = PreferenceDataset(prefix)
    batch, groups = packed_row(dataset, 1, 400)
    layout = batch.layout
    kinds = _segment_kinds([dataset[g] for g in groups], len(layout.starts))
    polygons, _ = _visible_areas(layout, kinds)
    size = layout.num_tokens
    keys, queries = np.meshgrid(np.arange(size), np.arange(size))
    centres = np.stack([keys.ravel() + 0.5, queries.ravel() + 0.6], axis=1)
    drawn = sum(Outline(polygon).contains_points(centres).astype(int) for polygon in polygons)
    ends = np.repeat(layout.subtree_ends, layout.lengths)
    visible = (keys <= queries) & (queries < ends[keys])
    assert np.array_equal(drawn.reshape(size, size), visible.astype(int))


def test_runs():
    assert _runs(np.array([5, 1, 1, 2])) == [(1, 3), (5, 6)]
    assert _runs(np.array([], int)) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tree", 3], "--tree is 3"),
        (["--tree", -1], "--tree is -1"),
        (["--row", 0], "--row needs --row-capacity"),
        (["--row", 9, "--row-capacity", 400], "--row is 9"),
        (["--row", -1, "--row-capacity", 400], "--row is -1"),
        (["--row", 0, "--row-capacity", 50], "is 50 and group 1 of"),
        (["--row-capacity", 0], "at least 1"),
        (["--picture", "x.png"], "--picture draws a row or a tree"),
        (["--tree", 0, "--row", 0, "--row-capacity", 400, "--picture", "x.png"], "or --tree"),
        (["--tree", 0, "--picture", "x"], "end it in .png"),
        (["--data", "x"], "--data is for a plan"),
        (["--tree", 0, "--row-capacity", 400], "has no effect with --tree"),
        (
            ["--row", 0, "--row-capacity", 400, "--picture", "no/such/dir/x.png"],
            "cannot be written",
        ),
        (["--row", 0, "--row-capacity", 400, "--picture", "x.wrong"], "cannot be written"),
    ],
)
def test_bad_usage(prefix, capsys, flags, message):
    code, out, err = inspect(capsys, prefix, *flags)
    assert (code, out) == (2, "") and message in err


def test_damage_is_an_error(prefix, tmp_path, capsys):
    assert inspect(capsys, tmp_path / "absent")[0] == 2
    import shutil

    for path in prefix.parent.glob("set*"):
        target = tmp_path / path.name
        shutil.copytree(path, target) if path.is_dir() else shutil.copy(path, target)
    content = bytearray((tmp_path / "set.bin").read_bytes())
    content[10] ^= 1
    (tmp_path / "set.bin").write_bytes(content)
    assert inspect(capsys, tmp_path / "set")[0] == 0
    code, _, err = inspect(capsys, tmp_path / "set", "--verify")
    assert code == 2 and "set.bin is damaged" in err


def test_toy_preferences(tmp_path):
    script = ROOT / "tools" / "make_toy_preferences.py"
    for name in ("a", "b"):
        args = ["--output", tmp_path / name, "--num-train", "60", "--num-valid", "20"]
        subprocess.run([sys.executable, script, *args], check=True, capture_output=True)
    prompts = {}
    for part, count in (("train", 60), ("valid", 20)):
        content = (tmp_path / "a" / f"{part}.jsonl").read_text()
        assert content == (tmp_path / "b" / f"{part}.jsonl").read_text()
        records = [json.loads(line) for line in content.splitlines()]
        prompts[part] = {r["prompt"] for r in records}
        assert len(prompts[part]) == len(records) == count
        assert all(len(r["chosen"]) == len(r["rejected"]) for r in records)
        assert all(r["chosen"] != r["rejected"] and len(r["prompt"]) > 300 for r in records)
    assert not prompts["train"] & prompts["valid"]
    build_dataset([tmp_path / "a" / "train.jsonl"], "bytes", tmp_path / "set")
