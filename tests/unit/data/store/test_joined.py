"""Several data sets as one."""

import pickle

import numpy as np
import pytest
from data_sets import TOKENIZER, assert_same, edit_manifest, random_tree, write

from megatron_prefix.data.store import PreferenceDataset, check_one_vocabulary, join_datasets
from megatron_prefix.data.store.columns import COLUMNS, OFFSETS, OPTIONAL_COLUMNS
from megatron_prefix.errors import InputError


@pytest.fixture
def parts(tmp_path):
    rng = np.random.default_rng(8)
    for name, count in (("a", 3), ("b", 5), ("c", 1)):
        write(tmp_path / name, [random_tree(rng) for _ in range(count)])
    return [PreferenceDataset(tmp_path / name) for name in "abc"]


def test_one_data_set_stays_itself(parts):
    assert join_datasets(parts[:1]) is parts[0] and parts[0].parts == (parts[0],)


def test_groups_and_columns_are_those_of_the_parts(parts):
    dataset = join_datasets(parts)
    assert len(dataset) == 9 and dataset.parts == tuple(parts)
    local = [(part, group) for part in parts for group in range(len(part))]
    for group, (part, number) in enumerate(local):
        assert_same(dataset[group], part[number])
        assert dataset.group_num_tokens(group) == part.group_num_tokens(number)
        assert dataset.place(group) == f"group {number} of {part.prefix}"
        for kind in ("nodes", "responses", "pairs"):
            whole, own = getattr(dataset, f"group_{kind}"), getattr(part, f"group_{kind}")
            assert whole[group + 1] - whole[group] == own[number + 1] - own[number]
    for name in (*COLUMNS, *OPTIONAL_COLUMNS, "node_lengths"):
        column = getattr(dataset, name)
        if name not in OFFSETS:
            columns = [getattr(part, name) for part in parts]
            np.testing.assert_array_equal(column, np.concatenate(columns))
        assert not column.flags.writeable
    assert dataset.groups_num_tokens().tolist() == [dataset.group_num_tokens(g) for g in range(9)]
    with pytest.raises(IndexError):
        dataset[9]
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = dataset.nothing


def test_it_pickles_as_its_prefixes(parts):
    data = pickle.dumps(join_datasets(parts))
    assert len(data) < 1000
    copy = pickle.loads(data)
    assert copy.fingerprint == join_datasets(parts).fingerprint and len(copy) == 9
    assert copy.fingerprint not in {part.fingerprint for part in parts}


def test_all_have_one_vocabulary(parts, tmp_path):
    tree = parts[0][0]
    for name, entry in {
        "same": {"vocabulary": "v", "fingerprint": "with a template"},
        "also": {"vocabulary": "v", "fingerprint": "with another template"},
        "other": {"vocabulary": "w", "fingerprint": "with a template"},
    }.items():
        write(tmp_path / name, [tree], {**TOKENIZER, **entry})
    same, also, other = (PreferenceDataset(tmp_path / n) for n in ("same", "also", "other"))
    check_one_vocabulary([same, also])
    with pytest.raises(InputError, match="same has tokenizer .* and .*other has tokenizer"):
        join_datasets([same, other])
    # one of version 2 does not know its vocabulary: the tokenizers must be the same
    with pytest.raises(InputError, match="fingerprint .*build all data sets with one tokenizer"):
        check_one_vocabulary([same, parts[0]])
    edit_manifest(tmp_path / "other", lambda m: m["tokenizer"].pop("vocabulary"))
    check_one_vocabulary([same, PreferenceDataset(tmp_path / "other")])
