"""What Transformer Engine is asked to do, on fake CUDA tensors: none of its kernels runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_prefix.attention.backends import te as module
from megatron_prefix.attention.backends.backend import Scoring
from megatron_prefix.attention.backends.te import te_attention
from megatron_prefix.attention.plan import TreePlan
from megatron_prefix.errors import InputError
from megatron_prefix.layout import TreeLayout

LAYOUT = TreeLayout.from_parents([512, 3584, 3584], [-1, 0, 0])
"""Two pieces, of 4096 and 3584 queries over 4096 keys each."""
SCORES_PER_HEAD = 2 * 4096 * 4096


@pytest.fixture
def attend(monkeypatch):
    """`attend(heads, capability)`: a row on a fake device with this compute capability."""
    calls = []

    def attend(num_heads, capability=(9, 0), installed=False):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(module, "has_flash_attn", lambda: installed)
        plan = TreePlan(LAYOUT, "cpu").path
        with FakeTensorMode(allow_non_fake_inputs=True):
            q = torch.empty(LAYOUT.num_tokens, num_heads, 8, device="cuda", dtype=torch.bfloat16)

            def make_kernel(*sizes):
                calls.append(sizes)
                raise KeyboardInterrupt  # the rest needs a kernel

            with pytest.raises(KeyboardInterrupt):
                te_attention(q, q, q, plan, Scoring(1.0), make_kernel)
        return calls

    return attend


@pytest.fixture
def deterministic():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def test_deterministic_rows_that_cudnn_does_not_take_are_refused(attend, deterministic):
    most = module.DETERMINISTIC_SCORES // SCORES_PER_HEAD
    assert most == 32  # so a row of 7680 tokens with 32 heads is one too many
    attend(most - 1)
    with pytest.raises(InputError, match="2 pieces x 32 heads x 4096 queries x 4096 keys.*install"):
        attend(most)
    attend(most, installed=True)
    attend(most, capability=(8, 0))
    attend(most, capability=(10, 0))


def test_without_determinism_any_row_is_computed(attend):
    assert attend(64)[0][0] == 64


def test_flash_attn_is_known_by_its_distribution(monkeypatch):
    """FlashAttention-4 makes a folder `flash_attn` too, so the folder says nothing."""

    def version(name):
        if name == "flash-attn-3":
            return "3.0.0b1"
        raise module.importlib.metadata.PackageNotFoundError(name)

    assert not module.has_flash_attn()
    monkeypatch.setattr(module.importlib.metadata, "version", version)
    assert module.has_flash_attn()


@pytest.fixture
def machine(monkeypatch):
    """`machine(version, cudnn)`: Transformer Engine and cuDNN as they are installed."""

    def machine(version, cudnn):
        monkeypatch.setattr(module.importlib.metadata, "version", lambda name: version)
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
        backend = replace(module.BACKEND, why_not=lambda *args: None)
        return lambda *features: backend.obstacle("cuda", torch.bfloat16, 64, features)

    return machine


def test_sinks_need_a_version_that_has_them(machine):
    assert "2.11.0 has no sinks" in machine("2.11.0", 91900)("sinks")
    assert "9.18 on, and torch has 91701" in machine("2.12.0", 91701)("sinks")
    assert "torch has None" in machine("2.12.0", None)("sinks")
    assert machine("2.12.0", 91800)("window", "sinks") is None
    assert machine("2.9.0", 91000)("window") is None
    assert "no soft cap" in machine("2.12.0", 91800)("softcap", "sinks")


def test_sinks_are_refused_with_deterministic_algorithms(machine, deterministic):
    assert "would compute every score" in machine("2.12.0", 91800)("sinks")
    q = torch.zeros(LAYOUT.num_tokens, 2, 8)
    scoring = Scoring(1.0, sinks=torch.zeros(2))
    with pytest.raises(InputError, match="backend: te: with torch's deterministic algorithms"):
        te_attention(q, q, q, TreePlan(LAYOUT, "cpu").path, scoring)
