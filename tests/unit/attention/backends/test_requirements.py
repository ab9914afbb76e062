"""Requirements of CUDA backends, in the order in which they are checked."""

import importlib.util

import pytest
import torch

from megatron_prefix.attention.backends import load_backend
from megatron_prefix.attention.backends.requirements import head_dim_fault

CUDA, BF16 = torch.device("cuda"), torch.bfloat16
MODULES = {"te": "transformer_engine", "flex": "triton"}


@pytest.fixture
def machine(monkeypatch):
    """`machine(capability, *installed)`: a device of that capability, or none, and modules."""

    def make(capability, *installed):
        real = importlib.util.find_spec
        named = set(MODULES.values())
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda x: (x in installed or None) if x in named else real(x),
        )
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)

    return make


@pytest.mark.parametrize("backend", ["flash", "te", "flex"])
def test_every_obstacle_in_turn(machine, backend):
    module, why_not = MODULES.get(backend), load_backend(backend).why_not
    machine(None)
    assert why_not(torch.device("mps"), BF16, None).startswith("it runs on CUDA, not on mps")
    assert "not in torch.float64; set dtype" in why_not(CUDA, torch.float64, None)
    if module:
        assert f"{module} is not installed; " in why_not(CUDA, BF16, None)
    machine(None, module)
    assert "finds no CUDA device" in why_not(CUDA, BF16, None)
    machine((6, 1), module)
    assert "this device has (6, 1)" in why_not(CUDA, BF16, None)
    machine((9, 0), module)
    assert why_not(CUDA, BF16, 128) is None
    assert "needs a head dim" in why_not(CUDA, BF16, 264)
    assert (why_not(CUDA, torch.float32, None) is None) == (backend == "flex")


@pytest.mark.parametrize(
    ("bounds", "fits", "does_not"),
    [
        ({"most": 256, "multiple": 8}, (8, 80, 256), (12, 264, 4)),
        ({"least": 16, "most": 256}, (16, 17, 256), (15, 257)),
    ],
)
def test_head_dims(bounds, fits, does_not):
    assert all(head_dim_fault(x, **bounds) is None for x in (None, *fits))
    for x in does_not:
        assert f"got {x}; use attention_backend path" in head_dim_fault(x, **bounds)
