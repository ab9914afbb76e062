"""Groups of all records with the same prompt, batches that count records, repeated records."""

import json
from contextlib import closing

import numpy as np
import pytest

from megatron_prefix.__main__ import main
from megatron_prefix.data.build import BuildOptions, build_dataset
from megatron_prefix.data.build.duplicates import Digests, DigestTable
from megatron_prefix.data.steps.compositions.batches import GroupBatches
from megatron_prefix.data.steps.compositions.record_batches import RecordBatches, group_batches
from megatron_prefix.data.steps.rows import loss_weights
from megatron_prefix.data.steps.sampler import Sampler
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.data.store.verify.checks import verify_dataset
from megatron_prefix.errors import InputError


def record(prompt, chosen, rejected, **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


RECORDS = [
    record("p", " yes", " no"),
    record("q", " one", " two", weight=0.5),
    record("p", " yes", " nope", margin=2),
    record("r", "x", "x"),
    record("p", " maybe", " no", score_chosen=3),
]


def build(tmp_path, records, name="out", **options):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    report = build_dataset(
        [path], "bytes", tmp_path / name, BuildOptions(overwrite=True, **options)
    )
    dataset = PreferenceDataset(tmp_path / name)
    verify_dataset(dataset)
    return report, dataset


def compared(dataset):
    """Every pair as (whole chosen path, its loss start, rejected path, …, weight, margin)."""
    pairs = []
    for group in range(len(dataset)):
        tree = dataset[group]
        for pair, sides in enumerate(tree.pairs.tolist()):
            paths = [tree.response_tokens(side) for side in sides]
            numbers = [tree.pair_weights[pair], tree.pair_margins[pair], *tree.scores[sides]]
            pairs.append(repr([[(t.tolist(), start) for t, start in paths], numbers]))
    return sorted(pairs)


def test_one_prompt_is_one_group_and_every_record_a_set(tmp_path):
    report, dataset = build(tmp_path, RECORDS, merge_prompts=True)
    assert dataset.group_records.tolist() == [0, 1]
    assert dataset.group_num_records.tolist() == [3, 1]
    tree = dataset[0]
    assert tree.response_sets.tolist() == [0, 0, 1, 1, 2, 2]
    assert tree.pairs.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert (tree.parents == -1).sum() == 1, "the prompt is stored once"
    assert loss_weights(dataset, 0, "group").tolist() == [1.0] * 3
    _, separate = build(tmp_path, RECORDS, "separate")
    assert separate.group_num_records.tolist() == [1] * 4
    assert compared(dataset) == compared(separate)
    before, after = (d.manifest["tokens"] for d in (separate, dataset))
    assert before["none"] == after["none"] and before["tree"] > after["tree"]
    assert dataset.manifest["report"]["merged"] == {
        "records": 4,
        "groups": 2,
        "tokens_before": before["tree"],
        "tokens": after["tree"],
    }
    assert f"{before['tree']} tree tokens became {after['tree']}" in report.summary()
    assert report.dropped["chosen equals rejected"].groups == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [
            "in.jsonl",
            *(f"{n}.{e}" for n in ("out", "separate") for e in ("bin", "idx", "json", "tree")),
        ]
    )


def test_merging_is_deterministic_and_keeps_different_prompts_apart(tmp_path):
    fingerprints = {
        build(tmp_path, RECORDS, name, merge_prompts=True)[1].fingerprint for name in "ab"
    }
    assert len(fingerprints) == 1
    records = [record(p, "a", "b") for p in ("p", "P", "p ", "pp")]
    assert len(build(tmp_path, records, merge_prompts=True)[1]) == 4


def test_conversation_trees_and_unpaired_responses_merge(tmp_path):
    def reply(text, rank, *below):
        return {"text": text, "role": "assistant", "rank": rank, "replies": list(below)}

    tree = {"text": "q", "role": "prompter", "replies": [reply("a", 0), reply("b", 1)]}
    deeper = {"text": "more?", "role": "prompter", "replies": [reply("c", 0), reply("d", 1)]}
    second = {**tree, "replies": [reply("a", 0, deeper), reply("e", 1)]}
    _, dataset = build(tmp_path, [{"prompt": tree}, {"prompt": second}], merge_prompts=True)
    assert dataset.group_num_records.tolist() == [2]
    assert dataset[0].response_sets.tolist() == [0, 0, 1, 1, 2, 2]
    alone = [{"prompt": "p", "completion": c, "label": c > "b"} for c in "abc"]
    _, dataset = build(tmp_path, alone, merge_prompts=True)
    assert dataset.group_num_records.tolist() == [3] and dataset[0].scores.tolist() == [0, 0, 1]


def test_a_failed_merge_leaves_nothing(tmp_path, capsys):
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps(RECORDS[0]) + "\n{oops\n")
    flags = ["--input", str(path), "--tokenizer", "bytes", "--merge-prompts"]
    assert main(["build", *flags, "--output", str(tmp_path / "deep" / "er" / "out")]) == 2
    assert "line 2" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_repeated_records_are_counted_and_kept(tmp_path):
    records = [
        record("p", "a", "b", id=1),
        record("p", "b", "a"),
        record("p", "a", "b", id=2, margin=3),
        record("p", "a", "bb"),
        record("x", "same", "same"),
        record("p", "a", "b"),
        record("pa", "", "b"),
        record("x", "same", "same"),
    ]
    report, dataset = build(tmp_path, records)
    assert len(dataset) == 6
    duplicates = dataset.manifest["report"]["duplicates"]
    assert duplicates == {"num_records": 2, "records": [[2, 0], [5, 0]]}
    assert "duplicates  2 records with the texts" in report.summary()
    assert "record 2 repeats record 0" in report.summary()
    unpaired = [{"prompt": "p", "completion": "c", "label": bool(i % 2)} for i in range(3)]
    report, _ = build(tmp_path, unpaired)
    assert report.as_dict()["duplicates"]["records"] == [[2, 0]]


def test_digests_are_compared_over_the_whole_stream():
    rng = np.random.default_rng(0)
    contents = rng.integers(-20, 20, 100).tolist()
    digests = [Digests(3 * i, content, content % 7) for i, content in enumerate(contents)]
    with closing(DigestTable()) as table:
        for start in range(0, 100, 40):
            table.extend(digests[start : start + 40])
        first = {}
        expected = [
            [3 * i, first[c]] for i, c in enumerate(contents) if first.setdefault(c, 3 * i) != 3 * i
        ]
        assert table.duplicates(1000) == {"num_records": len(expected), "records": expected}
        assert table.duplicates(2) == {"num_records": len(expected), "records": expected[:2]}
        prompts = [content % 7 for content in contents]
        expected = [[i for i in range(100) if prompts[i] == p] for p in dict.fromkeys(prompts)]
        assert list(table.by_prompt()) == expected
    with closing(DigestTable()) as table:
        assert table.duplicates(5) == {"num_records": 0, "records": []}
        assert list(table.by_prompt()) == []


def test_a_full_disk_for_digests_is_an_error_that_names_the_remedy():
    with closing(DigestTable()) as table:
        table._run("PRAGMA max_page_count = 10")
        with pytest.raises(InputError, match="full.*TMPDIR"):
            table.extend(Digests(i, i, i) for i in range(100_000))


def test_batches_of_records_by_hand():
    batches = RecordBatches(np.array([2, 1, 3, 1, 1]), 4, "f", 1, limit=1)
    batches._epoch(0)[0][:] = np.arange(5)
    batches._epoch(0)[1][:] = [0, 2, 3, 6, 7]
    assert [batches.groups(s).tolist() for s in range(3)] == [[0, 1, 2], [3, 4], []]
    assert batches.num_steps(1) == 2


@pytest.mark.parametrize("seed", range(8))
def test_batches_of_records_take_every_group_once_an_epoch(seed):
    rng = np.random.default_rng(seed)
    batch = int(rng.integers(3, 9))
    sizes = rng.integers(1, batch + 1, int(rng.integers(1, 30)))
    batches = RecordBatches(sizes, batch, "f", seed, limit=3)
    steps = [batches.groups(s) for s in range(batches.num_steps(3))]
    assert all(len(groups) for groups in steps) and not len(batches.groups(len(steps)))
    taken = np.concatenate(steps)
    for epoch in range(3):
        part = taken[epoch * len(sizes) : (epoch + 1) * len(sizes)]
        assert sorted(part.tolist()) == list(range(len(sizes)))
    ends = np.cumsum([sizes[groups].sum() for groups in steps])
    assert (np.abs(ends - batch * np.arange(1, len(steps) + 1)) < batch).all()


@pytest.mark.parametrize("limit", [None, 2])
def test_groups_of_one_record_make_the_batches_of_groups(limit):
    ones = RecordBatches(np.ones(7, np.int64), 3, "f", 5, limit)
    plain = GroupBatches(7, 3, "f", 5, limit)
    assert [ones.groups(s).tolist() for s in range(6)] == [
        plain.groups(s).tolist() for s in range(6)
    ]
    assert ones.num_steps(2) == plain.num_steps(2)


def test_batches_of_a_data_set(tmp_path):
    _, merged = build(tmp_path, RECORDS, merge_prompts=True)
    assert isinstance(group_batches(merged, 3, 1), RecordBatches)
    with pytest.raises(InputError, match="global_batch_size is 2 and group 0 .* holds 3 records"):
        group_batches(merged, 2, 1)
    _, separate = build(tmp_path, RECORDS, "separate")
    assert isinstance(group_batches(separate, 2, 1), GroupBatches)
    sampler = Sampler(dataset=merged, composition=group_batches(merged, 4, 1), row_capacity=99)
    plan = sampler.step(0)
    assert plan.num_pairs == 4 and plan.denominators["pair"] == 3.5
