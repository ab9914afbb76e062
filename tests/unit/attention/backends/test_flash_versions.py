"""The FlashAttention that torch's operators call: selected inside a context, restored after it."""

import sys

import pytest
import torch

from megatron_prefix.attention.backends import flash_versions as module
from megatron_prefix.attention.backends.arity import returned_values, unpacked_values
from megatron_prefix.attention.backends.flash_versions import (
    active_version,
    flash_version,
    resolve_flash_version,
    why_not_version,
)
from megatron_prefix.config import parse_config
from megatron_prefix.distributed.session import open_session
from megatron_prefix.errors import InputError

pytestmark = pytest.mark.skipif(
    not hasattr(torch.nn.attention, "activate_flash_attention_impl"),
    reason="before torch 2.11 there is one version only",
)


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
    with pytest.raises(ValueError, match="4 cannot be used: .*flash-attn-4<=4.0.0b17"):
        resolve_flash_version(4, "cpu")
    with pytest.raises(ValueError, match="'5' is unknown"):
        resolve_flash_version("5", "cpu")
    monkeypatch.setattr(module, "_is_installed", lambda name: True)
    assert "runs on CUDA, not on cpu" in why_not_version(3, "cpu")
    monkeypatch.delattr(torch.nn.attention, "restore_flash_attention_impl")
    assert "lacks torch.nn.attention.restore_" in why_not_version(3, "cpu")


@pytest.fixture
def put_flash_attn_4(tmp_path, monkeypatch):
    """Makes a package whose forward function returns these values."""

    def put(returns):
        package = tmp_path / "flash_attn" / "cute"
        package.mkdir(parents=True)
        for path in (package.parent / "__init__.py", package / "__init__.py"):
            path.touch()
        (package / "interface.py").write_text(
            f"raise AssertionError('imported')\ndef _flash_attn_fwd(q):\n    return {returns}\n"
        )
        monkeypatch.syspath_prepend(tmp_path)

    yield put
    for name in ("flash_attn", "flash_attn.cute"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(("returns", "fits"), [("out, lse", True), ("out, lse, p, top", False)])
def test_values_that_torch_cannot_unpack_are_refused(put_flash_attn_4, monkeypatch, returns, fits):
    """4.0.0b17 returns 2 values, 4.0.0b20 4."""
    put_flash_attn_4(returns)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    obstacle = why_not_version(4, "cuda")
    if fits:
        assert obstacle is None
    else:
        assert "returns 4 values" in obstacle and "takes 2: " in obstacle
        assert "pip install 'flash-attn-4<=4.0.0b17'" in obstacle


def test_what_cannot_be_read_is_no_fault(tmp_path, monkeypatch):
    (tmp_path / "caller.py").write_text("a, *rest = module.run(1)\nb = module.walk(1)\n")
    (tmp_path / "called.py").write_text("def run(x):\n    return x\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert unpacked_values("caller", "run") is unpacked_values("caller", "walk") is None
    assert returned_values("called", "run") is returned_values("called", "other") is None
    assert returned_values("no.such.module", "run") is None
    # torch's own source, as installed
    assert unpacked_values("torch.nn.attention._fa4", "_flash_attn_fwd") == 2


@pytest.mark.parametrize(
    ("capability", "installed", "expected"),
    [((9, 0), True, 3), ((9, 0), False, 2), ((10, 0), True, 2), ((8, 0), True, 2)],
)
def test_auto_is_three_on_hopper_if_installed(monkeypatch, capability, installed, expected):
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
    with pytest.raises(InputError, match="flash_version = 3 has no effect with .* leave it out"):
        configured(attention_backend=backend, flash_version=3)


def test_a_run_sets_the_version_and_restores_it(monkeypatch, fake):
    config = configured(attention_backend="flash", flash_version=3)
    with pytest.raises(InputError, match="model.flash_version 3 cannot be used: "):
        with open_session(config):
            raise AssertionError("entered")
    monkeypatch.setattr(module, "why_not_version", lambda *_: None)
    with open_session(config) as world:
        assert world.device.type == "cpu" and fake.active == ["FA3"]
    with open_session(configured(attention_backend="path")):
        assert fake.active == []
