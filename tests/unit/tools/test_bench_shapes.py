"""What the benchmark of attention counts and how it fills the table that `auto` follows."""

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[3] / "tools"))
import bench_attention  # noqa: E402
import bench_shapes  # noqa: E402

from megatron_prefix.attention.plan import build_path_plan  # noqa: E402
from megatron_prefix.layout import TreeLayout  # noqa: E402
from megatron_prefix.testing import random_forest  # noqa: E402


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("tiles", [(1, 1), (4, 4), (8, 3)])
def test_tiled_area_counts_tiles_with_a_visible_pair(seed, tiles):
    layout = random_forest(np.random.default_rng(seed))
    plan = build_path_plan(layout, "cpu")
    expected = 0
    for n, m in zip(plan.q_lengths, plan.kv_lengths, strict=True):
        seen = np.tril(np.ones((n, m), bool), m - n)
        rows, columns = np.nonzero(seen)
        expected += len(set(zip(rows // tiles[0], columns // tiles[1], strict=True)))
    assert bench_shapes.tiled_area(layout, *tiles) == expected * tiles[0] * tiles[1]
    assert bench_shapes.tiled_area(layout, 1, 1) == layout.area()


def test_rows_of_sequences():
    layout = TreeLayout.from_parents([3, 2, 4, 5], [-1, 0, 0, -1])
    paths = bench_shapes.unshared(layout)
    assert paths.lengths.tolist() == [5, 7, 5]
    assert bench_shapes.first_paths(paths, 12).lengths.tolist() == [5, 7]
    assert bench_shapes.first_paths(paths, 1).lengths.tolist() == [5]
    assert bench_shapes.plain_causal(55).lengths.tolist() == [10]


@pytest.mark.parametrize("name", bench_shapes.SETS)
def test_medians_are_the_published_ones(name):
    prompt, response = bench_shapes.medians(name)
    trees = bench_shapes.shapes()[name](np.random.default_rng(0))
    lengths = np.array([next(trees).lengths for _ in range(2000)])
    assert np.median(lengths[:, 0]) == pytest.approx(prompt, rel=0.06)
    assert np.median(lengths[:, 1:]) == pytest.approx(response, rel=0.06)
    assert (prompt + response, prompt / response) == pytest.approx(bench_shapes.SETS[name])


def test_the_fastest_backend_that_ran_everywhere_gets_the_entry():
    def row(trees, factor, backend, time):
        return {
            "trees": trees,
            "tokens": 64,
            "gather factor": factor,
            "backend": backend,
            "time over fastest": time,
        }

    rows = [
        row("a", "1.50", "dense", "1.00"),
        row("a", "1.50", "path", "1.20"),
        row("a", "1.50", "flash", "1.10"),
        row("b", "5.00", "path", "2.00"),
        row("c", "9.00", "path", "2.00"),
        row("b", "5.00", "flash", "1.00"),
    ]
    args = argparse.Namespace(device="cpu", dtype="float32", head_dim=64)
    low, high = bench_attention.table_entries(rows, args)
    assert (low["backend"], low["gather_factor"]) == ("flash", [None, 2.0])
    assert (high["backend"], high["gather_factor"]) == ("path", [4.0, None])
    assert high["measured"]["time over fastest"] == {"path": 2.0}
    assert high["measured"]["rows"] == 2 and low["head_dim"] == [64, 65]
