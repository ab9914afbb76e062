"""Verification by whole columns: what it sees, and that spans leave nothing out."""

from itertools import product

import numpy as np
import pytest
from data_sets import edit_manifest, random_tree, write

from megatron_prefix.data.store.blocks import Block
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.data.store.verify.checks import verify_dataset
from megatron_prefix.data.store.verify.problems import shape_problems
from megatron_prefix.data.store.verify.spans import Span, all_spans
from megatron_prefix.errors import InputError


@pytest.fixture
def trees():
    rng = np.random.default_rng(3)
    return [random_tree(rng) for _ in range(7)]


@pytest.fixture
def prefix(tmp_path, trees):
    write(tmp_path / "set", trees)
    return tmp_path / "set"


@pytest.mark.parametrize("name", ["tokens", "lengths"])
def test_a_manifest_with_other_counts_is_found_despite_its_checksum(prefix, name):
    def change(manifest):
        counts = manifest["tokens"] if name == "tokens" else manifest["lengths"]["path"]
        counts["pair" if name == "tokens" else "max"] += 1

    edit_manifest(prefix, change)
    with pytest.raises(InputError, match=rf"\.json: {name} are not those of the files"):
        verify_dataset(PreferenceDataset(prefix))


def naive_preorder(parents):
    """Whether each parent is on the path to the node before."""
    above = []
    for node, parent in enumerate(parents):
        while above and above[-1] != parent:
            above.pop()
        if parent >= 0 and not above:
            return False
        above.append(node)
    return True


def test_pre_order_is_distinguished_from_every_other_order():
    """All parents of up to five nodes in the second of three groups; -2 to 4 each."""
    for parents in product(range(-1, 4), repeat=5):
        nodes = [-1, 0, *parents, -1]
        columns = {"group_nodes": np.array([2, 5, 1]), "node_parents": np.array(nodes)}
        block = Block(tokens=np.arange(8), node_lengths=np.ones(8, np.int64), columns=columns)
        problem = next(shape_problems(Span(0, 3, block)), None)
        assert (problem is None) == naive_preorder(parents), (parents, problem)
        assert problem is None or problem[0] == 1


@pytest.mark.parametrize("nodes", [1, 9, 10**6])
def test_spans_hold_every_group_once(prefix, trees, nodes):
    parts = list(all_spans(PreferenceDataset(prefix), nodes))
    assert [span.start for span in parts] == [0, *(span.stop for span in parts[:-1])]
    assert parts[-1].stop == len(trees) and (len(parts) == 1) == (nodes == 10**6)
    tokens = np.concatenate([span.block.tokens for span in parts])
    assert tokens.tolist() == [t for tree in trees for t in tree.tokens.tolist()]
