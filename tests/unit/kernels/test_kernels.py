"""The Triton kernels have the values and gradients of the operations that define them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_prefix.kernels import why_no_kernels

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton: pip install triton")


def interpreted(*arguments: str) -> dict[str, str]:
    """Case -> what differs, from a process of its own."""
    command = [sys.executable, str(Path(__file__).with_name("interpreted.py")), *arguments]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@needs_triton
def test_kernels_equal_the_operations_that_define_them():
    cases = interpreted()
    assert len(cases) == 24
    assert {name: faults for name, faults in cases.items() if faults} == {}


@needs_triton
@pytest.mark.slow
def test_a_kernel_that_is_one_percent_off_is_detected_in_every_case():
    assert {name for name, faults in interpreted("break").items() if not faults} == set()


def test_kernels_need_cuda_and_triton(monkeypatch):
    assert why_no_kernels("cpu") == "Triton kernels run on CUDA, not on cpu: leave it out"
    assert why_no_kernels(torch.device("cuda")) is None or not HAS_TRITON
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in why_no_kernels("cuda")
