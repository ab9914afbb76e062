import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from data_sets import TOKENIZER, assert_same, damage, edit_manifest, random_tree, write

from megatron_prefix.data.files.checksums import file_entry, manifest_digest
from megatron_prefix.data.files.columns import ColumnWriter
from megatron_prefix.data.store.blocks import Block
from megatron_prefix.data.store.columns import COLUMNS, OPTIONAL_COLUMNS
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.data.store.manifest import FILES, fingerprint, suffix_path
from megatron_prefix.data.store.verify.checks import verify_checksums, verify_dataset
from megatron_prefix.data.store.writer import DatasetWriter
from megatron_prefix.data.tree import Pair, ResponsePath, build_tree
from megatron_prefix.errors import InputError


@pytest.fixture
def trees():
    rng = np.random.default_rng(3)
    return [random_tree(rng) for _ in range(7)]


@pytest.fixture
def prefix(tmp_path, trees):
    write(tmp_path / "set", trees, records=[0, 2, 3, 5, 6, 8, 9])
    return tmp_path / "set"


def test_round_trip(prefix, trees):
    dataset = PreferenceDataset(prefix)
    verify_dataset(dataset)
    assert len(dataset) == 7 and dataset.vocab_size == 100
    for i, tree in enumerate(trees):
        assert_same(dataset[i], tree)
        assert dataset.group_num_tokens(i) == tree.num_tokens
    assert dataset.groups_num_tokens().tolist() == [t.num_tokens for t in trees]
    assert dataset.group_records.tolist() == [0, 2, 3, 5, 6, 8, 9]
    with pytest.raises(IndexError):
        dataset[7]
    with pytest.raises(IndexError):
        dataset[-1]


def test_paths_are_kept_as_columns(prefix, trees):
    dataset = PreferenceDataset(prefix)
    paths = [t.response_tokens(r) for t in trees for r in range(t.num_responses)]
    assert dataset.response_lengths.tolist() == [len(tokens) for tokens, _ in paths]
    assert dataset.response_prompts.tolist() == [start for _, start in paths]


def test_pairs_and_own_tokens_are_numbered_through_the_data_set(prefix, trees):
    """Groups of 5 responses, with the pairs (0, 1), (2, 0) and (3, 4) of their own."""
    dataset = PreferenceDataset(prefix)
    sides = [
        [5 * group + side for side in pair] for group in range(7) for pair in trees[group].pairs
    ]
    assert dataset.pair_sides.tolist() == sides and sides[3:6] == [[5, 6], [7, 5], [8, 9]]
    paths = [t.response_tokens(r) for t in trees for r in range(t.num_responses)]
    assert dataset.own_tokens.tolist() == [len(tokens) - start for tokens, start in paths]


def test_everything_is_memory_mapped_and_pickles_small(prefix):
    dataset = PreferenceDataset(prefix)
    for name in (*COLUMNS, "tokens", "node_lengths", "node_pointers"):
        assert isinstance(getattr(dataset, name), np.memmap), name
    data = pickle.dumps(dataset)
    assert len(data) < 1000
    assert_same(pickle.loads(data)[3], dataset[3])
    tree = dataset[0]
    del dataset
    assert tree.tokens.sum() > 0 and not isinstance(tree.tokens, np.memmap)


def test_megatron_core_reads_the_same_tokens(prefix, trees):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    indexed = IndexedDataset(str(prefix))
    nodes = [t.node_tokens(n).tolist() for t in trees for n in range(t.num_nodes)]
    assert [indexed[i].tolist() for i in range(len(indexed))] == nodes
    sizes = np.diff(indexed.document_indices).tolist()
    assert sizes == [t.num_nodes for t in trees]


def test_equal_data_gives_equal_bytes_and_another_tokenizer_another_name(tmp_path, trees):
    first, second = write(tmp_path / "a", trees), write(tmp_path / "b" / "c", trees)
    assert first == second
    other = write(tmp_path / "d", trees, {**TOKENIZER, "fingerprint": "0" * 64})
    assert other["files"] == first["files"] and other["fingerprint"] != first["fingerprint"]
    moved = PreferenceDataset(tmp_path / "b" / "c")
    assert moved.fingerprint == PreferenceDataset(tmp_path / "a").fingerprint
    for name in FILES:
        assert suffix_path(tmp_path / "a", name).read_bytes() == (
            suffix_path(tmp_path / "b" / "c", name).read_bytes()
        )


def large_ids(top):
    paths = [ResponsePath(tokens=np.array([1, t]), loss_start=1) for t in (top, 2)]
    return build_tree(paths, [Pair(chosen=0, rejected=1)])


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, "uint16"), (65537, "int32")])
def test_tokens_are_as_wide_as_the_vocabulary_needs(tmp_path, vocab_size, dtype):
    tokenizer = {**TOKENIZER, "vocab_size": vocab_size}
    write(tmp_path / "a", [large_ids(vocab_size - 1)], tokenizer)
    dataset = PreferenceDataset(tmp_path / "a")
    verify_dataset(dataset)
    assert dataset.tokens.dtype == dtype and dataset[0].tokens.max() == vocab_size - 1


@pytest.mark.parametrize("top", [100, 70000, -1])
def test_ids_outside_the_vocabulary_are_refused(tmp_path, top):
    with pytest.raises(InputError, match=f"token id {top}.*has ids 0 to 99"):
        write(tmp_path / "a", [large_ids(top)])
    assert list(tmp_path.iterdir()) == []


def test_nothing_stays_of_a_build_that_fails(tmp_path, trees):
    with pytest.raises(RuntimeError), DatasetWriter(tmp_path / "new" / "x" / "a", TOKENIZER) as w:
        w.add(trees[0], 0)
        raise RuntimeError
    with DatasetWriter(tmp_path / "a", TOKENIZER) as writer:
        writer.add(trees[0], 0)
    with pytest.raises(InputError, match="would be empty"):
        write(tmp_path / "a", [])
    assert list(tmp_path.iterdir()) == []


def test_the_old_data_set_stays_until_the_new_one_is_complete(prefix, trees):
    before = PreferenceDataset(prefix).fingerprint
    with pytest.raises(RuntimeError), DatasetWriter(prefix, TOKENIZER) as writer:
        writer.add(trees[0], 0)
        raise RuntimeError
    verify_dataset(PreferenceDataset(prefix))
    assert PreferenceDataset(prefix).fingerprint == before
    write(prefix, trees[:2])
    dataset = PreferenceDataset(prefix)
    verify_dataset(dataset)
    assert len(dataset) == 2
    names = sorted(p.name for p in prefix.parent.iterdir())
    assert names == ["set.bin", "set.idx", "set.json", "set.tree"]


def test_a_build_killed_while_moving_leaves_nothing_that_opens(prefix, trees, monkeypatch):
    import megatron_prefix.data.store.writer as store

    moved = []

    def replace(source, target):
        if len(moved) == 2:
            raise KeyboardInterrupt
        moved.append((source, target))
        source.rename(target)

    monkeypatch.setattr(store.os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        write(prefix, trees[:2])
    with pytest.raises(InputError, match="is missing"):
        PreferenceDataset(prefix)


def test_places_that_cannot_be_written(tmp_path, trees):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write(tmp_path / "file" / "a", trees)
    with pytest.raises(InputError, match="is a directory"):
        write(f"{tmp_path}/", trees)


def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path, trees, monkeypatch):
    def full(self, values):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ColumnWriter, "write", full)
    with pytest.raises(InputError, match="No space left"):
        write(tmp_path / "a", trees)
    assert list(tmp_path.iterdir()) == []


def test_opening_without_a_data_set(tmp_path):
    with pytest.raises(InputError, match=r"no data set .*absent.*absent\.json is missing"):
        PreferenceDataset(tmp_path / "absent")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_or_shortened_file_is_seen_on_opening(prefix, name):
    path = suffix_path(prefix, name)
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(InputError, match=re.escape(f"{path} has {len(content) - 1} bytes")):
        PreferenceDataset(prefix)
    path.unlink()
    with pytest.raises(InputError, match=re.escape(f"{path} is missing")):
        PreferenceDataset(prefix)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_seen_by_the_checksums(prefix, name):
    path = suffix_path(prefix, name)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    dataset = PreferenceDataset(prefix, check=False)
    for check in (verify_checksums, verify_dataset):
        with pytest.raises(InputError, match=re.escape(f"{path} is damaged")):
            check(dataset)
    with pytest.raises(InputError, match=re.escape(f"{path} is damaged")):
        PreferenceDataset.verified(prefix)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=9), "has version 9"),
        (lambda m: m.update(format="other"), "not a manifest that megatron-prefix build wrote"),
        (lambda m: m.pop("counts"), "lacks 'counts'"),
        (lambda m: m["files"].pop(".bin"), "lacks '.bin'"),
        (lambda m: m["counts"].update(groups="7"), "damaged"),
        (lambda m: m.update(dtype="object"), "damaged"),
        (lambda m: m["counts"].update(groups=6), "not the index"),
        (lambda m: m["counts"].update(responses=6), "in its manifest"),
    ],
)
def test_a_manifest_that_does_not_fit_is_seen_on_opening(prefix, change, message):
    edit_manifest(prefix, change)
    with pytest.raises(InputError, match=message):
        PreferenceDataset(prefix)


def test_manifests_that_are_not_json_or_have_a_wrong_fingerprint(prefix):
    edit_manifest(prefix, lambda m: m.update(fingerprint="0" * 64))
    with pytest.raises(InputError, match="fingerprint is wrong"):
        PreferenceDataset(prefix)
    manifest = suffix_path(prefix, ".json")
    manifest.write_text(manifest.read_text().replace('"options": {}', '"options": {"a": 1}'))
    with pytest.raises(InputError, match="its SHA-256 differs"):
        PreferenceDataset(prefix)
    suffix_path(prefix, ".json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        PreferenceDataset(prefix)


def test_columns_with_pickled_objects_are_not_loaded(prefix):
    path = suffix_path(prefix, ".tree/pair_weights.npy")
    np.save(path, np.array([print] * 21, object), allow_pickle=True)
    seal_file(prefix, ".tree/pair_weights.npy")
    with pytest.raises(InputError, match="pair_weights.npy cannot be read"):
        PreferenceDataset(prefix)


@pytest.mark.parametrize(
    ("name", "at", "value", "message"),
    [
        ("group_nodes", 0, 1, "group_nodes.npy: offsets"),
        ("group_nodes", 1, 3, "documents are not the groups"),
        ("group_responses", 2, 4, "group_responses.npy: offsets"),
        ("group_pairs", -1, 20, "group_pairs.npy: offsets"),
        ("group_records", 3, 2, "records do not ascend"),
        ("node_parents", 0, 3, "group 0: node 0 does not follow"),
        ("node_parents", 2, -2, "group 0: node 2 has a parent"),
        ("response_first", 1, 99, "group 0: response_first points outside"),
        ("response_last", 1, -1, "group 0: response_last points outside"),
        ("response_first", 0, 4, "group 0: response 0 begins off"),
        ("response_lengths", 5, 1, "group 1: response_lengths differ"),
        ("response_prompts", 5, 0, "group 1: response_prompts differ"),
        ("response_sets", 4, 0, "group 0: pair 2 takes its responses from two"),
        ("response_ranks", 0, -2, "group 0: response_ranks of response 0 is not .* at least -1"),
        ("response_scores", 0, np.inf, "group 0: response_scores of response 0"),
        ("pair_responses", 0, (1, 1), "group 0: pair 0 compares"),
        ("pair_responses", 0, (1, 9), "group 0: pair_responses points outside"),
        ("pair_weights", 0, 0.0, "group 0: pair_weights of pair 0 is not .*: above 0"),
        ("pair_weights", 0, np.nan, "group 0: pair_weights of pair 0 is not .*: above 0"),
        ("pair_margins", 0, np.inf, "group 0: pair_margins of pair 0"),
    ],
)
def test_a_wrong_layout_is_seen_though_checksums_fit(prefix, name, at, value, message):
    damage(prefix, name, at, value)
    with pytest.raises(InputError, match=message):
        PreferenceDataset(prefix)
    with pytest.raises(InputError, match=message):
        verify_dataset(PreferenceDataset(prefix, check=False))


def seal_file(prefix, suffix):
    def seal(manifest):
        manifest["files"][suffix] = file_entry(suffix_path(prefix, suffix))
        manifest["fingerprint"] = fingerprint(manifest["files"], manifest["tokenizer"])

    edit_manifest(prefix, seal)


def test_wrong_tokens_and_index_are_seen_though_checksums_fit(prefix):
    path = suffix_path(prefix, ".bin")
    good = path.read_bytes()
    tokens = np.memmap(path, np.uint16, "r+")
    tokens[5] = 100
    tokens.flush()
    seal_file(prefix, ".bin")
    with pytest.raises(InputError, match="outside the vocabulary"):
        verify_dataset(PreferenceDataset(prefix))
    path.write_bytes(good)
    seal_file(prefix, ".bin")
    index = np.memmap(suffix_path(prefix, ".idx"), np.int32, "r+", offset=34, shape=(2,))
    index[:] = [index[0] + 1, index[1] - 1]
    index.flush()
    seal_file(prefix, ".idx")
    with pytest.raises(InputError, match=r"\.idx: (pointers|node lengths)"):
        verify_dataset(PreferenceDataset(prefix))


def test_siblings_that_begin_the_same_are_refused(tmp_path):
    tree = large_ids(7)
    object.__setattr__(tree, "tokens", np.array([1, 2, 2]))
    write(tmp_path / "a", [tree])
    with pytest.raises(InputError, match="two children of node 0 begin with the same token"):
        verify_dataset(PreferenceDataset(tmp_path / "a"))


def test_column_headers_hold_any_length(tmp_path):
    for values, tail in ((np.arange(5), ()), (np.zeros((0, 2)), (2,)), (np.ones((3, 2)), (2,))):
        column = ColumnWriter(tmp_path / "c.npy", np.dtype("<i4"), tail)
        for value in values:
            column.write(value)
        column.close()
        column.close()
        loaded = np.load(tmp_path / "c.npy", mmap_mode="r" if len(values) else None)
        assert loaded.dtype == np.int32 and np.array_equal(loaded, values)


def test_the_documented_columns_have_their_types():
    """A line "| `pair_responses` | int32 [P, 2] | … | rule |": int32, two numbers an entry; for
    optional columns "| rule | value if absent |"."""
    text = (Path(__file__).resolve().parents[4] / "docs" / "data_format.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \[(.*?)\] \| (.*) \|$", text, re.MULTILINE)
    documented = {name: (dtype, shape, cells.split(" | ")) for name, dtype, shape, cells in rows}
    for name, about in {**COLUMNS, **OPTIONAL_COLUMNS}.items():
        dtype, shape, cells = documented[name]
        tail = {(): "", (2,): ", 2", (None,): ", A"}[about.tail]
        assert (dtype, shape[1:].replace("+1", "")) == (about.dtype.name, tail), name
        assert cells[1] == about.rule, name
        if name in OPTIONAL_COLUMNS:
            np.testing.assert_equal(float(cells[2]), about.absent)


def test_the_documented_reader_reads_what_was_written(prefix, trees):
    text = (Path(__file__).resolve().parents[4] / "docs" / "data_format.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    assert "megatron" not in code and code.count("\n") <= 45
    namespace = {}
    exec(code, namespace)
    groups = list(namespace["read"](prefix))
    assert len(groups) == len(trees)
    for (responses, pairs), tree in zip(groups, trees, strict=True):
        for i, (prompt, own) in enumerate(responses):
            tokens, loss_start = tree.response_tokens(i)
            assert (prompt + own, len(prompt)) == (tokens.tolist(), loss_start)
        assert [p for p, _ in pairs] == tree.pairs.tolist()
        assert [w for _, w in pairs] == tree.pair_weights.tolist()


def with_optional(block, **columns):
    return Block(
        tokens=block.tokens,
        node_lengths=block.node_lengths,
        columns={**block.columns, **columns},
    )


@pytest.fixture
def with_betas(tmp_path, trees):
    """Groups 0 to 2 without, 3 to 6 with optional columns, then one without."""
    first, last = (write(tmp_path / name, part) for name, part in (("a", trees[:3]), ("b", trees)))
    assert first["columns"].keys() == last["columns"].keys() == COLUMNS.keys()
    plain, others = PreferenceDataset(tmp_path / "a"), PreferenceDataset(tmp_path / "b")
    more = others.block(3, 7)
    pairs, responses = len(more.columns["pair_weights"]), len(more.columns["response_ranks"])
    with DatasetWriter(tmp_path / "betas", TOKENIZER) as writer:
        writer.add_block(plain.block(0, 3))
        writer.add_block(
            with_optional(
                more,
                pair_betas=np.full(pairs, 0.25),
                response_attributes=np.ones((responses, 5)),
            )
        )
        writer.add_block(with_optional(plain.block(0, 1), group_records=np.array([9])))
        writer.finish()
    return tmp_path / "betas"


def test_optional_columns_have_their_stated_value_where_they_are_absent(prefix, with_betas):
    plain, dataset = PreferenceDataset(prefix), PreferenceDataset(with_betas)
    assert plain.columns == [*COLUMNS]
    assert np.isnan(plain.pair_betas).all() and len(plain.pair_betas) == len(plain.pair_weights)
    assert (plain.response_roles == 0).all() and plain.response_roles.dtype == np.int32
    assert plain.response_attributes.shape == (len(plain.response_ranks), 0)
    assert sorted(set(dataset.columns) - set(COLUMNS)) == ["pair_betas", "response_attributes"]
    start, stop = dataset.group_pairs[[3, 7]]
    assert (dataset.pair_betas[start:stop] == 0.25).all()
    assert np.isnan(np.delete(dataset.pair_betas, np.s_[start:stop])).all()
    start, stop = dataset.group_responses[[3, 7]]
    assert dataset.response_attributes.shape[1] == 5
    assert (dataset.response_attributes[start:stop] == 1).all()
    assert np.isnan(dataset.response_attributes[:start]).all()
    verify_dataset(dataset)
    betas = dataset.block(2, 4).columns["pair_betas"]
    assert len(betas) == dataset.group_pairs[4] - dataset.group_pairs[2]
    damage(with_betas, "pair_betas", int(dataset.group_pairs[3]), -1.0)
    with pytest.raises(InputError, match="group 3: pair_betas of pair 0 .* above 0"):
        verify_dataset(PreferenceDataset(with_betas))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["columns"].update(node_images={}), "the column node_images, which this"),
        (lambda m: m["files"].update({".images": {}}), "the file PREFIX.images, which this"),
        (lambda m: m["columns"].pop("node_parents"), "the file PREFIX.tree/node_parents.npy"),
        (lambda m: m.pop("columns"), "lacks 'columns'"),
        (lambda m: m["columns"]["pair_weights"].update(dtype="int8"), "column pair_weights is"),
        (lambda m: m["columns"]["pair_responses"].update(shape=[3]), "column pair_responses is"),
        (
            lambda m: [m[key].pop(name) for key, name in MARGINS],
            "lacks the column pair_margins",
        ),
    ],
)
def test_unknown_and_missing_columns_are_refused_by_name(prefix, change, message):
    edit_manifest(prefix, change)
    with pytest.raises(InputError, match=message):
        PreferenceDataset(prefix)


MARGINS = (("columns", "pair_margins"), ("files", ".tree/pair_margins.npy"))


def test_a_column_that_the_manifest_does_not_list_is_refused(prefix):
    np.save(suffix_path(prefix, ".tree/pair_betas.npy"), np.ones(3))
    with pytest.raises(InputError, match=r"pair_betas.npy is not a file of this data set"):
        PreferenceDataset(prefix)


def as_version_2(manifest):
    manifest["version"] = 2
    del manifest["columns"]
    for key in ("vocabulary", "begin_of_text", "end_of_text"):
        manifest["tokenizer"].pop(key, None)
    manifest["sha256"] = manifest_digest(manifest)


def test_version_2_is_read_as_before(prefix, trees):
    new = PreferenceDataset(prefix)
    edit_manifest(prefix, as_version_2)
    old = PreferenceDataset(prefix)
    verify_dataset(old)
    assert old.fingerprint == new.fingerprint and old.columns == new.columns
    for name in (*COLUMNS, *OPTIONAL_COLUMNS):
        np.testing.assert_array_equal(getattr(old, name), getattr(new, name))
    for group, tree in enumerate(trees):
        assert_same(old[group], tree)
