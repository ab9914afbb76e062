import numpy as np
import pytest

from megatron_prefix.data.store.blocks import Block
from megatron_prefix.data.store.statistics import Histogram, Statistics, path_lengths
from megatron_prefix.data.tree import Pair, ResponsePath, build_tree


def test_path_lengths_and_sharing_by_hand():
    paths = [
        ResponsePath(tokens=np.array([1, 2, 3, 4, 5]), loss_start=2),
        ResponsePath(tokens=np.array([1, 2, 6]), loss_start=2),
        ResponsePath(tokens=np.array([1, 2, 3, 7]), loss_start=2),
    ]
    tree = build_tree(paths, [Pair(chosen=0, rejected=1), Pair(chosen=0, rejected=2)])
    lengths, prompts = path_lengths(tree)
    assert lengths.tolist() == [5, 3, 4] and prompts.tolist() == [2, 2, 2]
    statistics = Statistics()
    statistics.add(Block.of_trees([tree], [(0, 1)]))
    # none: 5+3 + 5+4; response: 5+3+4; pair: (2+3+1) + (2+3+2); tree: 1 2 3 4 5 6 7
    assert statistics.tokens == {"none": 17, "response": 12, "pair": 13, "tree": 7}
    assert statistics.lengths()["path"] == {
        "min": 3, "median": 4, "p95": 5, "p99": 5, "max": 5, "mean": 4.0
    }  # fmt: skip


def test_a_pair_shares_only_what_is_prompt_on_both_sides():
    paths = [
        ResponsePath(tokens=np.array([1, 2, 3, 4]), loss_start=2),
        ResponsePath(tokens=np.array([1, 2, 3, 5]), loss_start=3),
    ]
    tree = build_tree(paths, [Pair(chosen=0, rejected=1)])
    statistics = Statistics()
    statistics.add(Block.of_trees([tree], [(0, 1)]))
    assert statistics.tokens == {"none": 8, "response": 8, "pair": 6, "tree": 5}


def test_histogram_against_sorting():
    values = np.random.default_rng(0).integers(0, 5000, 1001)
    histogram = Histogram()
    for part in np.split(values, [10, 500]):
        histogram.add(part)
    summary, ordered = histogram.summary(), np.sort(values)
    assert summary["median"] == ordered[500] and summary["p99"] == ordered[990]
    assert (summary["min"], summary["max"]) == (ordered[0], ordered[-1])
    assert summary["mean"] == pytest.approx(values.mean(), abs=1e-3)
