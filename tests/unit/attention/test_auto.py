"""The choice of the backend `auto`."""

import json

import pytest
import torch

from megatron_prefix.attention.api import resolve_backend
from megatron_prefix.attention.auto import FIELDS, TABLE, candidates, read_table

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def entry(**fields):
    return {**dict.fromkeys(FIELDS), **fields}


def fitting(entries, device=CUDA, dtype=torch.bfloat16, head_dim=128, gather_factor=1.5):
    return candidates(tuple(entries), device, dtype, head_dim, gather_factor)


def test_entries_fit_in_order_by_every_field():
    entries = [
        entry(device_type="cuda", gather_factor=[4.0, None], backend="flex"),
        entry(device_type="cuda", dtypes=["bfloat16", "float16"], head_dim=[64, 129], backend="te"),
        entry(device="NVIDIA H200", backend="flash"),
        entry(backend="path"),
    ]
    assert fitting(entries) == ["te", "path"]
    assert fitting(entries, gather_factor=4.0) == ["flex", "te", "path"]
    assert fitting(entries, gather_factor=None) == ["te", "path"]
    assert fitting(entries, head_dim=129) == fitting(entries, dtype=torch.float32) == ["path"]
    assert fitting(entries, device=CPU) == ["path"]


def test_the_table_is_whole_and_says_what_was_measured():
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    for row in table["entries"]:
        assert tuple(row) == FIELDS
        measured = row["measured"]
        assert measured is None or {"device", "torch", "date", "commit", "command"} <= set(measured)
    last = read_table()[-1]
    assert last["backend"] == "path" and set(last.values()) == {None, "path"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gather_factor", [None, 1.0, 20.0])
def test_auto_on_cpu_is_path(dtype, gather_factor):
    assert resolve_backend("auto", "cpu", dtype, 20, gather_factor) == "path"
