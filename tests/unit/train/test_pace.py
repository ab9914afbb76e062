"""The share of the GPUs' peak that a step reaches, on a device that only has a name here."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_config

from megatron_prefix.platform.gpus import GPUS, peak_of_device
from megatron_prefix.train.pace import Pace, run_peak

COUNTS = {"num_pairs": 2, "tokens/executed": 100, "tokens/logical": 150}


def config(tmp_path, **sections):
    return tiny_config("set", tmp_path, model={"dtype": "bfloat16"}, **sections)


@pytest.fixture
def two_h100(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**30)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)


class Groups(SimpleNamespace):
    def __len__(self) -> int:
        return 8


def sampler(cost=True):
    return SimpleNamespace(cost=cost or None, dataset=Groups(), composition=None)


def test_the_share_of_the_peak(two_h100, tmp_path):
    pace = Pace(config(tmp_path), sampler(), 2)
    # 3 x 1e15 operations in 4 seconds, of 2 x 989.5e12 per second
    values = pace.values(1, 4.0, COUNTS, 1e15)
    assert values["mfu"] == pytest.approx(3e15 / (4 * 2 * 989.5e12), abs=1e-4)


def test_it_is_left_out_if_it_is_not_known(two_h100, tmp_path, monkeypatch):
    assert run_peak(config(tmp_path), sampler()) == 2 * GPUS["H100"].bf16_flops
    assert run_peak(config(tmp_path), sampler(cost=False)) is None
    assert run_peak(config(tmp_path, lora={"r": 2}), sampler()) is None
    assert run_peak(tiny_config("set", tmp_path), sampler()) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 PCIe")
    assert run_peak(config(tmp_path), sampler()) is None
    assert peak_of_device("NVIDIA H100 PCIe") is None


def test_a_cpu_has_none(tmp_path):
    assert "mfu" not in Pace(config(tmp_path), sampler(), 2).values(1, 1.0, COUNTS, 1.0)
