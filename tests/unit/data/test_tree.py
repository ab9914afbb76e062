import numpy as np
import pytest

from megatron_prefix.data.tree import Pair, PrefixTree, ResponsePath, build_tree


def path(tokens, loss_start, **more):
    return ResponsePath(tokens=np.array(tokens, np.int64), loss_start=loss_start, **more)


def random_paths(rng, count, alphabet=3, length=12):
    """Paths of few different tokens, so that they share much; a prompt of 1 to 3 tokens."""
    prompt = rng.integers(0, alphabet, rng.integers(1, 4)).tolist()
    rows = [
        prompt + rng.integers(0, alphabet, rng.integers(1, length)).tolist() for _ in range(count)
    ]
    return [path(row, len(prompt)) for row in rows]


def test_worked_example():
    paths = [path([5, 6, 7, 8, 2], 2), path([5, 6, 7, 9, 2], 2), path([5, 6, 7], 2)]
    tree = build_tree(paths, [Pair(chosen=0, rejected=1), Pair(chosen=2, rejected=1, weight=0.5)])
    assert tree.tokens.tolist() == [5, 6, 7, 8, 2, 9, 2]
    assert tree.node_offsets.tolist() == [0, 2, 3, 5, 7]
    assert tree.parents.tolist() == [-1, 0, 1, 1]
    assert tree.response_first.tolist() == [1, 1, 1]
    assert tree.response_last.tolist() == [2, 3, 1]
    assert tree.pairs.tolist() == [[0, 1], [2, 1]]
    assert tree.pair_weights.tolist() == [1.0, 0.5]
    assert np.isnan(tree.pair_margins).all() and np.isnan(tree.scores).all()


def test_loss_that_starts_inside_a_shared_run_cuts_it():
    tree = build_tree([path([1, 2, 3, 4], 2), path([1, 2, 3, 5], 3)], [Pair(chosen=0, rejected=1)])
    assert tree.node_lengths.tolist() == [2, 1, 1, 1]
    assert [tree.response_nodes(0), tree.response_nodes(1)] == [[1, 2], [3]]


def test_different_first_tokens_make_several_roots():
    tree = build_tree([path([1, 2], 1), path([3, 2], 1)], [Pair(chosen=0, rejected=1)])
    assert tree.parents.tolist() == [-1, 0, -1, 2]


def test_equal_paths_share_everything():
    tree = build_tree([path([1, 2, 3], 1), path([1, 2, 3], 1)], [])
    assert tree.tokens.tolist() == [1, 2, 3]
    assert tree.response_last.tolist() == [1, 1]


def prefixes(paths):
    return {tuple(p.tokens[: n + 1].tolist()) for p in paths for n in range(len(p.tokens))}


@pytest.mark.parametrize("seed", range(60))
def test_against_brute_force(seed):
    rng = np.random.default_rng(seed)
    paths = random_paths(rng, int(rng.integers(1, 9)))
    tree = build_tree(paths, [])
    for i, p in enumerate(paths):
        tokens, loss_start = tree.response_tokens(i)
        assert tokens.tolist() == p.tokens.tolist() and loss_start == p.loss_start
    assert tree.num_tokens == len(prefixes(paths)), "every distinct prefix is one token"
    check_pre_order(tree)


def check_pre_order(tree: PrefixTree):
    assert (tree.node_lengths >= 1).all()
    for node in range(tree.num_nodes):
        assert tree.parents[node] < node
        if tree.parents[node] >= 0:
            assert tree.parents[node] in tree.path(node - 1), "a parent is on the path before"
    starts = [(int(tree.parents[n]), int(tree.node_tokens(n)[0])) for n in range(tree.num_nodes)]
    assert len(set(starts)) == len(starts), "siblings begin with different tokens"


@pytest.mark.parametrize("seed", range(20))
def test_restrict_keeps_the_chosen_responses(seed):
    rng = np.random.default_rng(seed)
    paths = random_paths(rng, 6)
    pairs = [Pair(chosen=a, rejected=b, weight=a + 1) for a in range(6) for b in range(6) if a < b]
    selected = sorted(rng.choice(6, 3, replace=False).tolist())
    tree = build_tree(paths, pairs).restrict(selected)
    for new, old in enumerate(selected):
        tokens, loss_start = tree.response_tokens(new)
        assert tokens.tolist() == paths[old].tokens.tolist() and loss_start == paths[old].loss_start
    assert tree.num_tokens == len(prefixes([paths[i] for i in selected]))
    assert tree.pairs.tolist() == [[0, 1], [0, 2], [1, 2]]
    assert tree.pair_weights.tolist() == [selected[0] + 1, selected[0] + 1, selected[1] + 1]
    check_pre_order(tree)


def test_restrict_to_responses_without_pairs():
    paths = [path([1, 2], 1), path([1, 3], 1), path([1, 4], 1)]
    tree = build_tree(paths, [Pair(chosen=0, rejected=1)]).restrict([0, 2])
    assert tree.num_pairs == 0 and tree.pair_weights.shape == (0,) and tree.pairs.shape == (0, 2)


def test_refuses_what_cannot_be_compared():
    good = [path([1, 2], 1), path([1, 3], 1, set_id=1)]
    with pytest.raises(ValueError, match="one prompt token"):
        build_tree([path([1, 2], 0)], [])
    with pytest.raises(ValueError, match="one response token"):
        build_tree([path([1, 2], 2)], [])
    with pytest.raises(ValueError, match="outside 0..1"):
        build_tree(good, [Pair(chosen=0, rejected=2)])
    with pytest.raises(ValueError, match="one set"):
        build_tree(good, [Pair(chosen=0, rejected=1)])
    with pytest.raises(ValueError, match="different responses"):
        build_tree(good, [Pair(chosen=0, rejected=0)])
