"""How the profile of a step divides time: by module, and each kernel once."""

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.autograd import DeviceType

sys.path.append(str(Path(__file__).resolve().parents[3] / "tools"))
from profile_step import PREFIX, part_of_module, parts_of  # noqa: E402

TE = {
    "TELinear": "linear layers",
    "TELayerNormColumnParallelLinear": "linear layers",
    "TEColumnParallelLinear": "linear layers",
    "RMSNorm": "norms",
    "SelfAttention": "rotary embedding, head layout",
    "Dropout": None,
}
PARENTS = {"TEColumnParallelLinear": "TELinear", "SelfAttention": "Attention"}


@pytest.mark.parametrize("name", TE)
def test_modules_are_known_by_their_classes_names(name):
    parent = type(PARENTS.get(name, "Module"), (torch.nn.Module,), {})
    assert part_of_module(type(name, (parent,), {})()) == TE[name]


@dataclass
class Event:
    name: str
    device_type: DeviceType
    self_device_time_total: float
    cpu_parent: object = None
    sequence_nr: int = -1
    self_cpu_time_total: float = 0.0
    is_user_annotation: bool = False


def test_a_kernel_counts_once_where_it_was_launched():
    part = Event(PREFIX + "attention", DeviceType.CPU, 9.0, is_user_annotation=True)
    operation = Event("aten::mm", DeviceType.CPU, 7.0, part)
    kernel = Event("sm90_gemm", DeviceType.CUDA, 7.0)
    assert parts_of([part, operation, kernel], on_cuda=True) == {"attention": 7.0}
