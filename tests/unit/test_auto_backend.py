"""What `auto` stands for, and which FlashAttention stands behind torch's operators."""

import json

import pytest
import torch

from megatron_prefix.attention import resolve_backend
from megatron_prefix.attention.auto import FIELDS, TABLE, candidates, read_table
from megatron_prefix.attention.backends import flash_version as module
from megatron_prefix.attention.backends.flash_version import (
    active_version,
    flash_version,
    resolve_flash_version,
    why_not_version,
)
from megatron_prefix.config.schema import parse_config
from megatron_prefix.distributed.session import open_session
from megatron_prefix.errors import InputError

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


class FakeKernels:
    """Takes the place of what torch's registration of an implementation does."""

    def __init__(self, monkeypatch, *names):
        self.active = []
        registry = torch.nn.attention._registry
        for name in names:
            register = lambda name=name: self.put(name)  # noqa: E731
            monkeypatch.setitem(registry._FLASH_ATTENTION_IMPLS, name, register)

    def put(self, name):
        self.active.append(name)
        return self

    def remove(self):
        self.active.pop()


@pytest.fixture
def fake(monkeypatch):
    kernels = FakeKernels(monkeypatch, "FA3", "FA4")
    yield kernels
    assert kernels.active == [] and active_version() == 2


def test_a_version_is_there_inside_only_and_nests(fake):
    with flash_version(3):
        assert active_version() == 3 and fake.active == ["FA3"]
        with flash_version(4):
            assert active_version() == 4 and fake.active == ["FA4"]
        with flash_version(2):
            assert active_version() == 2 and fake.active == []
        assert active_version() == 3 and fake.active == ["FA3"]
    with pytest.raises(KeyError), flash_version(4):
        raise KeyError("taken away on the way out, too")


def test_what_is_not_there_is_refused_with_a_remedy(monkeypatch):
    with pytest.raises(ValueError, match="3 cannot be used: .* hopper/ .* or use flash_version 2"):
        resolve_flash_version(3, "cpu")
    with pytest.raises(ValueError, match="4 cannot be used: .* `pip install flash-attn-4`"):
        resolve_flash_version(4, "cpu")
    with pytest.raises(ValueError, match="'5' is unknown"):
        resolve_flash_version("5", "cpu")
    monkeypatch.setattr(module, "_is_installed", lambda name: True)
    assert "runs on CUDA, not on cpu" in why_not_version(3, "cpu")
    monkeypatch.delattr(torch.nn.attention, "restore_flash_attention_impl")
    assert "lacks torch.nn.attention.restore_" in why_not_version(3, "cpu")


@pytest.mark.parametrize(
    ("capability", "installed", "expected"),
    [((9, 0), True, 3), ((9, 0), False, 2), ((10, 0), True, 2), ((8, 0), True, 2)],
)
def test_auto_is_three_on_hopper_where_installed(monkeypatch, capability, installed, expected):
    monkeypatch.setattr(module, "_is_installed", lambda name: installed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert resolve_flash_version("auto", "cuda") == expected


def configured(**model):
    return parse_config(
        {
            "data": {"train": "none", "row_capacity": 64, "global_batch_size": 1},
            "model": {
                "num_layers": 1,
                "hidden_size": 32,
                "ffn_hidden_size": 32,
                "num_attention_heads": 2,
                **model,
            },
            "optimizer": {"lr": 1e-3},
            "train": {"steps": 1},
            "logging": {"output": "none"},
        }
    )


@pytest.mark.parametrize("backend", ["auto", "path", "te"])
def test_a_version_without_its_backend_is_refused(backend):
    with pytest.raises(InputError, match="flash_version = 3 counts only with .* leave it out"):
        configured(attention_backend=backend, flash_version=3)


def test_a_run_puts_the_version_in_place_and_takes_it_away(monkeypatch, fake):
    config = configured(attention_backend="flash", flash_version=3)
    with pytest.raises(InputError, match="model.flash_version 3 cannot be used: "):
        with open_session(config):
            raise AssertionError("entered")
    monkeypatch.setattr(module, "why_not_version", lambda *_: None)
    with open_session(config) as here:
        assert here.device.type == "cpu" and fake.active == ["FA3"]
    with open_session(configured(attention_backend="path")):
        assert fake.active == []
