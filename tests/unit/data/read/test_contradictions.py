"""Scores against labels, and what --on-contradiction does with them."""

import pytest

from megatron_prefix.data.build import BuildOptions, build_dataset
from megatron_prefix.data.read import ExampleReader
from megatron_prefix.data.read.formats import DegenerateRecord
from megatron_prefix.errors import InputError

PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}


def read(mode, chosen, rejected, **more):
    record = {**PAIR, "score_chosen": chosen, "score_rejected": rejected, **more}
    example = ExampleReader(on_contradiction=mode).read(record)
    notes = [note.split(" (")[0] for note in example.notes]
    return [(r.response, r.score, r.rank) for r in example.responses], example.pairs, notes


BEST_FIRST = [("a", 1.0, 0), ("b", 9.0, 1)]
EQUAL = "pairs whose scores are equal"


@pytest.mark.parametrize("mode", ["keep", "drop", "swap", "error"])
def test_scores_that_agree_change_nothing(mode):
    for scores in ((2, 1), (None, 1), (1, None), (None, None)):
        responses, (pair,), notes = read(mode, *scores)
        assert [text for text, *_ in responses] == ["a", "b"] and notes == []
        assert (pair.chosen, pair.rejected) == (0, 1)


def test_keep_counts():
    assert read("keep", 1, 9)[0] == BEST_FIRST
    assert read("keep", 1, 9)[2] == ["pairs whose scores contradict their label"]
    assert read("keep", 5, 5)[2] == [EQUAL]


def test_drop_drops_both_kinds():
    for scores in ((1, 9), (5, 5)):
        with pytest.raises(DegenerateRecord, match="scores equal or against the label"):
            read("drop", *scores)


def test_swap_swaps_what_contradicts():
    responses, (pair,), notes = read("swap", 1, 9, margin=2.0)
    assert responses == [("b", 9.0, 0), ("a", 1.0, 1)] and pair.margin == 2.0
    assert (pair.chosen, pair.rejected) == (0, 1)
    assert notes == ["pairs whose scores contradicted their label"]
    assert read("swap", 5, 5)[2] == [EQUAL]


def test_error_stops():
    for scores in ((1, 9), (5, 5)):
        with pytest.raises(InputError, match="has the score .* --on-contradiction keep, drop"):
            read("error", *scores)
    with pytest.raises(InputError, match="'never' is not one of keep, drop, swap, error"):
        ExampleReader(on_contradiction="never")


@pytest.mark.parametrize(
    "names",
    [
        ("chosen_score", "rejected_score"),
        ("chosen-rating", "rejected-rating"),
        ("rating_chosen", "rating_rejected"),
    ],
)
def test_scores_under_other_names(names):
    record = {**PAIR, **dict(zip(names, (1, 9), strict=True))}
    reader = ExampleReader()
    assert [r.score for r in reader.read(record).responses] == [1.0, 9.0]
    assert reader.unread == []
    text = {**PAIR, **dict.fromkeys(names, "9")}
    reader.read(text)
    assert reader.unread == list(names), "a text is no score"


def test_ranks_against_scores():
    entries = [("x", 0, 1.0), ("y", 1, 5.0), ("z", 2, 0.0)]
    completions = [{"completion": c, "rank": r, "score": s} for c, r, s in entries]
    record = {"context": "q", "completions": completions}
    assert len(ExampleReader().read(record).notes) == 1
    pairs = ExampleReader(on_contradiction="drop").read(record).pairs
    assert [(p.chosen, p.rejected) for p in pairs] == [(0, 2), (1, 2)]
    pairs = ExampleReader(on_contradiction="swap").read(record).pairs
    assert [(p.chosen, p.rejected) for p in pairs] == [(1, 0), (0, 2), (1, 2)]


def test_the_summary_counts_both(tmp_path):
    path = tmp_path / "in.jsonl"
    rows = (
        '{"prompt": "p%d", "chosen": "a", "rejected": "b", "score_chosen": %d, "score_rejected": 5}'
    )
    path.write_text("".join(rows % (i, i) + "\n" for i in (3, 5, 6)))
    summary = build_dataset([path], "bytes", tmp_path / "x").summary()
    assert "warning  pairs whose scores are equal (kept): 1" in summary
    assert "--on-contradiction): 1" in summary
    report = build_dataset([path], "bytes", tmp_path / "y", BuildOptions(on_contradiction="drop"))
    assert report.manifest["counts"]["groups"] == 1
    assert report.dropped["scores equal or against the label (--on-contradiction drop)"].groups == 2
