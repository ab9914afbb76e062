"""Properties of token paths and trees that hold for every input."""

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prefix.data.build.prompt_groups import merge_trees
from megatron_prefix.data.read.formats import Example, ExampleResponse
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.data.store.verify.checks import verify_dataset
from megatron_prefix.data.store.writer import DatasetWriter
from megatron_prefix.data.tokenize import PathEncoder, load_tokenizer, select
from megatron_prefix.data.tree import Pair, ResponsePath, build_tree

BYTES = load_tokenizer("bytes")
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@st.composite
def groups(draw):
    """Paths of three different tokens, so that they share much; all pairs of a set."""
    paths = []
    for set_id in range(draw(st.integers(1, 3))):
        tokens = st.lists(st.integers(0, 2), max_size=6)
        above = draw(st.sampled_from([p.tokens.tolist() for p in paths])) if paths else []
        prompt = above + draw(tokens)
        prompt = prompt or [0]
        for _ in range(draw(st.integers(2, 4))):
            own = draw(tokens) + [draw(st.integers(0, 3))]
            path = np.array(prompt + own, np.int64)
            paths.append(ResponsePath(tokens=path, loss_start=len(prompt), set_id=set_id))
    pairs = [
        Pair(chosen=i, rejected=j, weight=1 + i)
        for i, a in enumerate(paths)
        for j, b in enumerate(paths)
        if i < j and a.set_id == b.set_id
    ]
    return paths, pairs


def prefixes(paths):
    return {tuple(p.tokens[: n + 1].tolist()) for p in paths for n in range(len(p.tokens))}


def check_tree(tree, paths):
    """Every path comes back, every distinct prefix is one token, nodes are in pre-order."""
    for i, path in enumerate(paths):
        tokens, loss_start = tree.response_tokens(i)
        assert tokens.tolist() == path.tokens.tolist() and loss_start == path.loss_start
    assert tree.num_tokens == len(prefixes(paths))
    starts = set()
    for node in range(tree.num_nodes):
        parent = int(tree.parents[node])
        assert parent < node and (parent < 0 or parent in tree.path(node - 1))
        starts.add((parent, int(tree.node_tokens(node)[0])))
    assert len(starts) == tree.num_nodes


@settings(max_examples=150, deadline=None)
@given(groups())
def test_trees_contain_their_paths_once(group):
    paths, pairs = group
    tree = build_tree(paths, pairs)
    check_tree(tree, paths)
    assert tree.pairs.tolist() == [[p.chosen, p.rejected] for p in pairs]


@settings(max_examples=60, deadline=None)
@given(st.lists(groups(), min_size=1, max_size=3))
def test_merged_trees_contain_the_paths_of_all(parts):
    tree = merge_trees([build_tree(*part) for part in parts])
    check_tree(tree, [path for paths, _ in parts for path in paths])
    sides = tree.response_sets[tree.pairs]
    assert (sides[:, 0] == sides[:, 1]).all()
    sizes = [len({path.set_id for path in paths}) for paths, _ in parts]
    assert len(set(tree.response_sets.tolist())) == sum(sizes)


@settings(max_examples=25, deadline=None)
@given(st.lists(groups(), min_size=1, max_size=4))
def test_stored_trees_come_back(parts):
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "set"
        trees = [build_tree(*part) for part in parts]
        with DatasetWriter(prefix, BYTES.describe()) as writer:
            for i, tree in enumerate(trees):
                writer.add(tree, 2 * i, 1 + i)
            writer.finish()
        dataset = PreferenceDataset(prefix)
        verify_dataset(dataset)
        assert dataset.group_num_records.tolist() == [1 + i for i in range(len(trees))]
        for group, tree in enumerate(trees):
            for name, value in vars(tree).items():
                np.testing.assert_array_equal(getattr(dataset[group], name), value)


@settings(max_examples=150, deadline=None)
@given(texts, st.lists(texts, min_size=2, max_size=4), st.sampled_from(["auto", "never"]))
def test_paths_are_prompt_and_response(prompt, responses, eos):
    example = Example(
        responses=tuple(ExampleResponse(prompt=prompt, response=text) for text in responses),
        pairs=tuple(Pair(chosen=0, rejected=i) for i in range(1, len(responses))),
    )
    paths, notes = PathEncoder(BYTES, eos=eos).encode(example)
    assert notes == []
    for path, text in zip(paths, responses, strict=True):
        ends = [257] * (eos == "auto")
        assert path.tokens.tolist() == [256, *f"{prompt}{text}".encode(), *ends]
        assert path.loss_start == 1 + len(prompt.encode())


@settings(max_examples=150, deadline=None)
@given(
    texts,
    st.lists(texts, min_size=2, max_size=4),
    st.integers(2, 30),
    st.sampled_from(["drop", "truncate-prompt"]),
)
def test_what_is_selected_fits_and_every_loss_has_a_reason(prompt, responses, limit, overflow):
    example = Example(
        responses=tuple(ExampleResponse(prompt=prompt, response=text) for text in responses),
        pairs=tuple(Pair(chosen=0, rejected=i) for i in range(1, len(responses))),
    )
    encoder = PathEncoder(BYTES)
    paths, _ = encoder.encode(example)
    selection = select(example, paths, encoder=encoder, max_length=limit, overflow=overflow)
    lost = [sum(counts) for counts in zip((0, 0), *selection.dropped.values(), strict=True)]
    assert lost == [
        len(responses) - len(selection.paths),
        len(example.pairs) - len(selection.pairs),
    ]
    for path in selection.paths:
        assert 1 < len(path.tokens) <= limit and 0 < path.loss_start < len(path.tokens)
        assert path.tokens[0] == 256 and path.tokens[-1] == 257
    if selection.paths:
        build_tree(selection.paths, selection.pairs)
