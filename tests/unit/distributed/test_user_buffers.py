"""Transformer Engine's buffers: made once, before the first model, of every row's size."""

from __future__ import annotations

import enum
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from tiny_models import tiny_config

from megatron_prefix.config import ParallelConfig
from megatron_prefix.distributed import World, check_row, open_session
from megatron_prefix.distributed.user_buffers import UserBuffers
from megatron_prefix.engine import build_model, optimizer
from megatron_prefix.errors import InputError, RunError


class Mode(enum.Enum):
    NONE, FP8 = 0, 1


@pytest.fixture
def engine(monkeypatch) -> SimpleNamespace:
    """In place of Transformer Engine's module; `calls` are those of its functions."""
    engine = SimpleNamespace(calls=[], fault=None)

    def initialize_ub(**arguments) -> None:
        if engine.fault is not None:
            raise RuntimeError(engine.fault)
        engine.calls.append(arguments)

    names = ("transformer_engine", *("pytorch", "module", "base"))
    for i in range(len(names)):
        name = ".".join(names[: i + 1])
        module = ModuleType(name)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    module.UserBufferQuantizationMode = Mode
    module.initialize_ub = initialize_ub
    module.destroy_ub = lambda: engine.calls.append("destroyed")
    return engine


def settings(**changes) -> SimpleNamespace:
    own = {"tp_comm_overlap": True, "hidden_size": 64, "tensor_model_parallel_size": 2}
    own |= {"fp8": None, "first_last_layers_bf16": False, "params_dtype": torch.bfloat16}
    own |= {"tp_comm_bootstrap_backend": "nccl", "virtual_pipeline_model_parallel_size": None}
    return SimpleNamespace(**own | changes)


def world_with(buffers) -> World:
    return World(ParallelConfig(), None, torch.device("cpu"), buffers=buffers)


def test_they_are_made_once_and_freed(engine):
    buffers, config = UserBuffers(500), settings()
    for _ in range(2):
        world_with(buffers).open_buffers(config)
    assert engine.calls == [
        {
            "shape": [500, 64],
            "tp_size": 2,
            "quantization_modes": [Mode.NONE],
            "dtype": torch.bfloat16,
            "bootstrap_backend": "nccl",
        }
    ]
    assert config.row_tokens == 500
    buffers.close()
    buffers.close()
    assert engine.calls[1:] == ["destroyed"]


@pytest.mark.parametrize(
    ("changes", "modes"),
    [
        ({"fp8": "hybrid"}, [Mode.FP8]),
        ({"fp8": "hybrid", "first_last_layers_bf16": True}, [Mode.FP8, Mode.NONE]),
    ],
)
def test_layers_in_fp8_have_buffers_in_fp8(engine, changes, modes):
    UserBuffers(16).open(settings(**changes))
    assert engine.calls[0]["quantization_modes"] == modes


def test_a_model_without_overlap_makes_none(engine):
    world_with(None).open_buffers(settings(tp_comm_overlap=False))
    assert engine.calls == []


def test_what_the_machine_lacks_is_said(engine):
    engine.fault = "no multicast"
    with pytest.raises(InputError, match=r"tp_comm_overlap = True: .*\(no multicast\): remove it"):
        UserBuffers(16).open(settings())


def test_processes_that_were_joined_without_them_are_refused(engine):
    with pytest.raises(InputError, match="this World has none: join the processes by open_session"):
        world_with(None).open_buffers(settings())


def test_a_row_of_another_length_is_refused():
    check_row(settings(), 7)  # a model without them
    check_row(settings(row_tokens=500), 500)
    with pytest.raises(
        RunError, match="a row has 498 tokens on this rank, and the buffers have 50"
    ):
        check_row(settings(row_tokens=500), 498)


@pytest.mark.parametrize(
    ("parallel", "fp8", "tokens"),
    [
        ({}, {}, 1000),
        ({"context_parallel_size": 2}, {}, 500),
        ({"context_parallel_size": 2}, {"fp8": "hybrid"}, 512),
    ],
)
def test_their_size_is_that_of_every_row(tmp_path, parallel, fp8, tokens):
    layout = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "tp_comm_overlap": True}
    sizes = {"hidden_size": 64, "ffn_hidden_size": 64, "num_query_groups": 2, "dtype": "bfloat16"}
    config = tiny_config(
        "set",
        tmp_path,
        data={"row_capacity": 999, "pad_rows": "capacity"},
        model=sizes | fp8,
        parallel=layout | parallel,
    )
    buffers = UserBuffers.of_run(config)
    assert buffers is not None and buffers.row_tokens == tokens


def test_a_session_makes_them_before_the_first_model_and_frees_them(tmp_path, monkeypatch, engine):
    config = tiny_config("set", tmp_path)
    monkeypatch.setattr(UserBuffers, "of_run", classmethod(lambda cls, config: cls(24)))

    def provide(*_, config, **__):
        engine.calls.append("model")
        return torch.nn.Linear(2, 2)

    monkeypatch.setattr(optimizer, "model_provider", provide)
    with open_session(config) as world:
        for _ in range(2):
            build_model(settings(bf16=False), world)
    assert engine.calls[0]["shape"] == [24, 64]
    assert engine.calls[1:] == ["model", "model", "destroyed"]
