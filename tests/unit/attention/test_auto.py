"""The choice of the backend `auto`."""

import json
from dataclasses import replace

import pytest
import torch

from megatron_prefix.attention import api
from megatron_prefix.attention.api import check_fused_sums, resolve_backend, tree_attention
from megatron_prefix.attention.auto import FIELDS, TABLE, candidates, gather_factors, read_table
from megatron_prefix.attention.backends import load_backend
from megatron_prefix.attention.backends.backend import runs_anywhere
from megatron_prefix.layout import TreeLayout

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


@pytest.fixture
def two_backends(monkeypatch):
    """A table whose choice depends on the row, and backends that need no device."""
    bounded = {"gather_factor": [None, 4.0], "dtypes": ["bfloat16"]}
    table = (entry(**bounded, backend="flash"), entry(backend="path"))
    monkeypatch.setattr(api, "read_table", lambda: table)
    monkeypatch.setattr(
        api,
        "load_backend",
        lambda name: replace(load_backend(name), why_not=runs_anywhere),
    )
    return table


def test_every_choice_of_the_table_is_among_the_gather_factors(two_backends):
    assert gather_factors(two_backends) == [0.0, 4.0]
    for factor, name in ((0.5, "flash"), (3.9, "flash"), (4.0, "path"), (9.0, "path")):
        assert resolve_backend("auto", CUDA, torch.bfloat16, 64, factor) == name


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("auto", torch.bfloat16, "auto, which chooses path here for some rows, and"),
        ("auto", torch.float32, "auto, which chooses path here, and"),
        ("path", torch.bfloat16, "path, and"),
    ],
)
def test_fused_sums_are_refused_if_a_row_copies_no_keys(two_backends, name, dtype, message):
    with pytest.raises(ValueError, match=f"key_sum_fusion = True.*{message} that copies no keys"):
        check_fused_sums(name, CUDA, dtype, 64)


def test_fused_sums_are_taken_where_every_row_copies_keys(two_backends, monkeypatch):
    check_fused_sums("flash", CUDA, torch.bfloat16, 64)
    monkeypatch.setattr(api, "read_table", lambda: (entry(backend="te"), entry(backend="path")))
    check_fused_sums("auto", CUDA, torch.float32, 64)


def test_a_call_with_fused_sums_refuses_a_backend_that_copies_no_keys():
    q, layout = torch.ones(3, 2, 8), TreeLayout.from_parents([3], [-1])
    with pytest.raises(ValueError, match="fuses_sums has no effect with the backend path"):
        tree_attention(q, q, q, layout, fuses_sums=True)
