"""The survey of a data set against the same counted one tree at a time."""

import json
from collections import Counter

import numpy as np
import pytest
from data_sets import damage, inspect, random_tree, write
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prefix.config import ModelConfig
from megatron_prefix.data.build.builder import build_dataset
from megatron_prefix.data.inspect.measure import COST_MODEL, span_work, survey
from megatron_prefix.data.inspect.report import survey_text
from megatron_prefix.data.steps.cost import CostModel, bundle_work
from megatron_prefix.data.steps.sharing import Bundle
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.data.store.statistics import Histogram
from megatron_prefix.data.store.verify import spans as spans_module
from megatron_prefix.data.store.verify.spans import all_spans


@pytest.fixture
def dataset(tmp_path):
    rng = np.random.default_rng(7)
    write(tmp_path / "set", [random_tree(rng) for _ in range(30)])
    return PreferenceDataset(tmp_path / "set")


@pytest.mark.parametrize("nodes", [1, 40, 10**6])
def test_the_work_of_a_span_is_that_of_its_groups(dataset, nodes):
    works = [span_work(span) for span in all_spans(dataset, nodes)]
    area, logit_tokens = (np.concatenate(part).tolist() for part in zip(*works, strict=True))
    for group in range(len(dataset)):
        work = bundle_work(dataset, Bundle(group, 0, 0), "tree")
        assert (area[group], logit_tokens[group]) == (work.area, work.logit_tokens)


@pytest.mark.parametrize("nodes", [1, 10**6])
def test_shapes_ratios_and_costs_against_trees(dataset, monkeypatch, nodes):
    monkeypatch.setattr(spans_module.all_spans, "__defaults__", (nodes,))
    shapes = survey(dataset)
    trees = [dataset[group] for group in range(len(dataset))]
    depth = Counter(max(len(tree.path(n)) for n in range(tree.num_nodes)) for tree in trees)
    assert shapes["nodes_on_longest_path"] == {str(d): n for d, n in sorted(depth.items())}
    assert shapes["responses_per_set"] == {"2": 30, "3": 30}
    assert shapes["sets_per_group"] == {"2": 30}
    ratios = []
    for tree in trees:
        for response in range(tree.num_responses):
            tokens, start = tree.response_tokens(response)
            ratios.append((start, len(tokens) - start))
    prompts, own = np.array(ratios).T
    ratio = shapes["prompt_over_response"]
    assert ratio["mean"] == round(prompts.sum() / own.sum(), 4)
    expected = np.histogram(prompts / own, [*ratio["edges"][:-1], np.inf])[0]
    assert ratio["counts"] == expected.tolist()
    model = CostModel.of_model(ModelConfig(**COST_MODEL).sizes(), dataset.vocab_size)
    costs = [
        bundle_work(dataset, Bundle(group, 0, 0), "tree")
        ._replace(tokens=trees[group].num_tokens)
        .cost(model)
        for group in range(len(dataset))
    ]
    order = sorted(range(len(dataset)), key=lambda group: (-costs[group], group))
    listed = shapes["expensive"]["by_cost"]
    assert [entry["group"] for entry in listed] == order[:10]
    assert listed[0]["cost"] == costs[order[0]]
    assert shapes["expensive"]["total_cost"] == pytest.approx(sum(costs))
    assert max(map(len, survey_text(shapes).splitlines()[2:])) <= 100


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3000), min_size=1, max_size=50), st.integers(2, 14))
def test_bins_hold_every_value_once(values, most):
    histogram = Histogram()
    histogram.add(np.array(values))
    bins = histogram.bins(most)
    edges, counts = bins["edges"], bins["counts"]
    assert len(counts) == len(edges) - 1 <= most and sum(counts) == len(values)
    assert counts == np.histogram(values, [*edges[:-1], edges[-1] - 0.5])[0].tolist()
    assert histogram.tally() == {str(v): values.count(v) for v in sorted(set(values))}


@pytest.mark.parametrize("name", ["node_parents", "response_first", "pair_responses"])
@pytest.mark.parametrize("value", [-5, 4, 10**8])
def test_damage_is_reported_without_a_check_of_checksums(tmp_path, capsys, name, value):
    """Entry 0: of a parent that comes later a tree would never end."""
    write(tmp_path / "set", [random_tree(np.random.default_rng(7)) for _ in range(3)])
    damage(tmp_path / "set", name, 0, value)
    row = ["--row", 0, "--row-capacity", 1000]
    for flags in ([], ["--tree", 0], row, ["--tree", 0, "--json"]):
        code, out, err = inspect(capsys, tmp_path / "set", *flags)
        assert (code, out) == (2, "") and "group 0: " in err, flags


def test_offsets_are_checked_before_they_are_used(tmp_path, capsys):
    write(tmp_path / "set", [random_tree(np.random.default_rng(7)) for _ in range(3)])
    damage(tmp_path / "set", "group_nodes", 1, 10**8)
    row = ["--row", 0, "--row-capacity", 1000]
    for flags in ([], ["--tree", 0], row):
        code, _, err = inspect(capsys, tmp_path / "set", *flags)
        assert code == 2 and "group_nodes.npy: offsets do not ascend" in err


def test_a_tree_and_its_picture(dataset, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "tree.png"
    code, out, _ = inspect(capsys, dataset.prefix, "--tree", 2, "--picture", path, "--json")
    assert code == 0 and json.loads(out)["tree"]["picture"] == str(path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_targets_are_marked_at_their_tokens(dataset):
    """Rows that predict, longer where several responses are; tokens that are predicted."""
    from megatron_prefix.data.inspect.describe import tree_row
    from megatron_prefix.data.inspect.picture import _segment_kinds, _target_marks

    batch = tree_row(dataset, 0)
    kinds = _segment_kinds([dataset[0]], len(batch.layout.starts))
    size = batch.layout.num_tokens
    rows, below = {}, set()
    for mark in _target_marks(batch.layout, kinds, batch.logit_token, 1.0):
        (left, top), (right, bottom) = mark[0], mark[2]
        if left > size:
            rows |= dict.fromkeys(range(int(top), int(bottom)), right - left)
        else:
            below |= set(range(int(left), int(right)))
    times = Counter(batch.logit_token.tolist())
    assert rows == {row: pytest.approx(0.4 if n == 1 else 1.0) for row, n in times.items()}
    own = {n for r in range(dataset[0].num_responses) for n in dataset[0].response_nodes(r)}
    offsets = dataset[0].node_offsets
    assert below == {t for n in own for t in range(offsets[n], offsets[n + 1])}


def test_unpaired_responses(tmp_path, capsys):
    rows = [{"prompt": "p" * n, "completion": "c", "label": n % 2 == 0} for n in (1, 2)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    build_dataset([tmp_path / "in.jsonl"], "bytes", tmp_path / "set")
    code, out, _ = inspect(capsys, tmp_path / "set", "--verify", "--json")
    statistics = json.loads(out)["statistics"]
    assert code == 0 and statistics["counts"]["pairs"] == 0
    assert statistics["factors"]["response"] == {
        "none": None,
        "response": 1,
        "pair": None,
        "tree": 1,
    }
    assert inspect(capsys, tmp_path / "set")[0] == 0
