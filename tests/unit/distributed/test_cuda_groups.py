"""The process groups of a run on CUDA, made by torch's fake backend, which communicates nothing."""

from __future__ import annotations

import contextlib

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_prefix.config import ParallelConfig
from megatron_prefix.distributed import join_world
from megatron_prefix.distributed import world as module


def test_on_cuda_one_group_only_has_gloo(monkeypatch):
    init, new_group = dist.init_process_group, dist.new_group
    asked: list[str | None] = []

    def init_fake(backend, **_):
        asked.append(backend)
        init("fake", store=FakeStore(), rank=0, world_size=8)

    def new_fake(*args, backend=None, **options):
        asked.append(backend)
        return new_group(*args, **options)

    monkeypatch.setattr(dist, "init_process_group", init_fake)
    monkeypatch.setattr(dist, "new_group", new_fake)
    monkeypatch.setenv("WORLD_SIZE", "8")
    for name, value in {"is_available": True, "set_device": None, "current_device": 0}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(module, "model_parallel_cuda_manual_seed", lambda seed: None)
    monkeypatch.setattr(module, "_meet", lambda timeout: (dist.HashStore(), 0))
    monkeypatch.setattr(module, "FailureDetection", lambda *_: Nobody())
    layout = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    with join_world(layout, seed=0) as world:
        assert world.host is not None and world.device.type == "cuda"
        assert world.groups.tp.size() == world.groups.pp.size() == 2
    assert asked[:2] == ["nccl", "gloo"]
    assert len(asked) > 20 and {*asked[2:]} == {None}, "the others inherit nccl"


class Nobody(contextlib.nullcontext):
    """Failure detection without other ranks."""

    def close(self):
        pass
