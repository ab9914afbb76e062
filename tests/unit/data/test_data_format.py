"""docs/data_format.md is enough: a data set and a plan read with numpy and nothing of the package.

The first half of this file imports nothing but json and numpy; that is the point of it.
"""

import json

import numpy as np


def read_groups(prefix):
    """Yield (responses, pairs) of each group: responses are (prompt tokens, own tokens)."""
    manifest = json.load(open(f"{prefix}.json"))
    nodes = manifest["counts"]["nodes"]
    column = {}
    for name in ("group_nodes", "group_responses", "group_pairs"):
        column[name] = np.fromfile(f"{prefix}.tree/{name}.npy", "<i8", offset=128)
    for name in ("node_parents", "response_first", "response_last", "pair_responses"):
        column[name] = np.fromfile(f"{prefix}.tree/{name}.npy", "<i4", offset=128)
    index = np.fromfile(f"{prefix}.idx", np.uint8)
    assert index[:9].tobytes() == b"MMIDIDX\0\0" and index[9:17].view("<u8")[0] == 1
    assert {4: "int32", 8: "uint16"}[index[17]] == manifest["dtype"]
    assert index[18:26].view("<u8")[0] == nodes
    lengths = index[34 : 34 + 4 * nodes].view("<i4")
    pointers = index[34 + 4 * nodes : 34 + 12 * nodes].view("<i8")
    data = open(f"{prefix}.bin", "rb").read()
    size = np.dtype(manifest["dtype"]).itemsize

    def tokens_of(node):
        part = data[pointers[node] : pointers[node] + size * lengths[node]]
        return np.frombuffer(part, manifest["dtype"]).tolist()

    for group in range(manifest["counts"]["groups"]):
        first = column["group_nodes"][group]
        start, stop = column["group_responses"][group : group + 2]
        responses = []
        for response in range(start, stop):
            node, parts, own = column["response_last"][response], [], 0
            while node >= 0:
                parts.insert(0, tokens_of(first + node))
                own = own or (node == column["response_first"][response]) * sum(map(len, parts))
                node = column["node_parents"][first + node]
            whole = sum(parts, [])
            responses.append((whole[: len(whole) - own], whole[len(whole) - own :]))
        start, stop = column["group_pairs"][group : group + 2]
        yield responses, column["pair_responses"].reshape(-1, 2)[start:stop].tolist()


def read_steps(plan):
    """Yield (groups, rows) of each step: rows are indices of the step's groups (sharing: tree)."""
    names = ("groups", "step_groups", "items", "row_items", "step_rows")
    groups, step_groups, items, row_items, step_rows = (
        np.load(f"{plan}/{name}.npy") for name in names
    )
    for step in range(json.load(open(f"{plan}/plan.json"))["counts"]["steps"]):
        rows = range(step_rows[step], step_rows[step + 1])
        parts = [items[row_items[row] : row_items[row + 1]].tolist() for row in rows]
        yield groups[step_groups[step] : step_groups[step + 1]].tolist(), parts


def test_a_data_set_is_read_with_numpy_alone(tmp_path):
    from megatron_prefix.data.store.dataset import PreferenceDataset
    from megatron_prefix.testing import write_random_set

    prefix = write_random_set(tmp_path / "set", 0, 9)
    dataset = PreferenceDataset(prefix)
    groups = list(read_groups(prefix))
    assert len(groups) == len(dataset) == 9
    for (responses, pairs), tree in zip(groups, (dataset[i] for i in range(9)), strict=True):
        assert pairs == tree.pairs.tolist()
        for i, (prompt, own) in enumerate(responses):
            tokens, loss_start = tree.response_tokens(i)
            assert (prompt, own) == (tokens[:loss_start].tolist(), tokens[loss_start:].tolist())


def test_a_plan_is_read_with_numpy_alone(tmp_path):
    from megatron_prefix.data.steps.compositions.settings import StepSettings
    from megatron_prefix.data.steps.packed.writing import write_packed_steps
    from megatron_prefix.data.steps.sampler import Sampler
    from megatron_prefix.data.store.dataset import PreferenceDataset
    from megatron_prefix.testing import write_random_set

    dataset = PreferenceDataset(write_random_set(tmp_path / "set", 0, 9))
    settings = StepSettings(seed=1, row_capacity=8192, global_batch_size=4, epochs=2)
    write_packed_steps(dataset, settings, tmp_path / "plan")
    sampler = Sampler(dataset=dataset, composition=settings.composition(dataset), row_capacity=8192)
    steps = list(read_steps(tmp_path / "plan"))
    assert len(steps) == 5
    for step, (groups, rows) in enumerate(steps):
        plan = sampler.step(step)
        assert groups == plan.groups.tolist()
        expected = [[bundle.group for bundle in row] for row in plan.rows[0]]
        assert [[groups[i] for i in row] for row in rows] == expected


def test_megatron_core_reads_the_index_byte_for_byte(tmp_path):
    """Its own builder makes the same two files of the same tokens."""
    import warnings

    from megatron_prefix.data.store.dataset import PreferenceDataset
    from megatron_prefix.testing import write_random_set

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    prefix = write_random_set(tmp_path / "set", 3, 7)
    dataset = PreferenceDataset(prefix)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dataset.tokens.dtype.type)
    for group in range(len(dataset)):
        tree = dataset[group]
        builder.add_document(tree.tokens, tree.node_lengths.tolist())
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        ours = (tmp_path / f"set.{suffix}").read_bytes()
        assert ours == (tmp_path / f"theirs.{suffix}").read_bytes()
