"""Training steps on the fake device, as a program of its own: prints the host's waits as JSON.

    LD_PRELOAD=…/libcuda.so.1 python fake_run.py CONFIG.json WORLD_SIZE [PLANT]

Ranks are those of torch's fake process groups: this is rank 0 of WORLD_SIZE. A run whose rank 0 is
not the last pipeline stage ends with its first backward pass, as the last stage's values are not
there. With a build of torch without CUDA the run ends before its first backward pass.
PLANT breaks something first, to show that it is detected.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
if "FAKE_ENGINE" in os.environ:  # before Megatron-Core looks for it
    from engine import import_engine

    import_engine(Path(os.environ["FAKE_ENGINE"]))
import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # noqa: F401  meta kernels of collectives
from contracts import remember
from fake_device import HostWaits, fake_device
from megatron.core.pipeline_parallel import schedules
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_prefix.attention import plan
from megatron_prefix.attention.backends import flash
from megatron_prefix.checkpoint import starting_model
from megatron_prefix.config import parse_config
from megatron_prefix.distributed import signals, world
from megatron_prefix.engine import feed, optimizer, step
from megatron_prefix.model.layers import norm
from megatron_prefix.train import run, setup, trainer


class Ended(BaseException):
    """What comes next cannot run: the values of the last pipeline stage are not there, or this
    build of torch has no streams of CUDA for backward."""


class AtOnce:
    """An executor whose work is done when it is submitted: fake tensors belong to a thread."""

    def __init__(self, **_: object) -> None:
        pass

    def submit(self, function: Callable, *args: Any) -> Future:
        future: Future = Future()
        future.set_result(function(*args))
        return future

    def shutdown(self, **_: object) -> None:
        pass


class Alone(contextlib.nullcontext):
    """Failure detection without other ranks."""

    def close(self) -> None:
        pass


def values_of_last_stage(values: list, device: torch.device) -> list:
    if not values:
        raise Ended
    return values


def no_backward(*_: Any, **__: Any) -> None:
    raise Ended


def same_of_all(values: list, value: Any, group: Any = None) -> None:
    values[:] = [value] * len(values)


@contextlib.contextmanager
def replaced(waits: HostWaits, size: int) -> Iterator[None]:
    """What needs other ranks, threads, or values that mean something; and the phases of a step."""
    init, new_group = dist.init_process_group, dist.new_group

    def init_fake(backend: str, **_: object) -> None:
        assert backend == "nccl", backend
        init("fake", store=FakeStore(), rank=0, world_size=size)

    def new_fake(*args: Any, backend: str | None = None, **options: Any) -> Any:
        return new_group(*args, **options)

    patches = {
        (dist, "init_process_group"): init_fake,
        (dist, "new_group"): new_fake,
        (dist, "all_gather_object"): same_of_all,
        (dist, "broadcast_object_list"): lambda *_, **__: None,
        (plan, "on_device"): remember(plan.on_device),
        (world, "_meet"): lambda timeout: (dist.HashStore(), 0),
        (world, "FailureDetection"): lambda *_: Alone(),
        (world.World, "beat"): lambda *_: None,
        (signals.StopRequest, "is_asked"): lambda self: False,
        (step, "from_last_stage"): values_of_last_stage,
        (setup, "reference_fingerprint"): lambda *_: "fake",
        (starting_model, "model_fingerprint"): lambda *_: "fake",
        (trainer, "check_first_step"): lambda *_: None,
        (run, "_close"): lambda *_: None,
        (feed, "ThreadPoolExecutor"): AtOnce,
        (feed.Feed, "_prepare"): waits.during("feed", feed.Feed._prepare),
        (optimizer.Policy, "gradients"): waits.during("passes", optimizer.Policy.gradients),
        (optimizer.Policy, "update"): waits.during("update", optimizer.Policy.update),
        (trainer, "step_totals"): waits.during("totals", trainer.step_totals),
        (trainer.Trainer, "train_step"): waits.during("rest", trainer.Trainer.train_step),
    }
    if torch.version.cuda is None:
        patches[schedules, "backward_step"] = no_backward
        patches[torch.autograd, "_engine_run_backward"] = no_backward
    if importlib.util.find_spec("triton") is not None:
        for name in ("rotary", "segments", "softmax", "swiglu"):
            module = importlib.import_module(f"megatron_prefix.kernels.{name}")
            patches[module, "launch"] = waits.launch_kernel
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, {"WORLD_SIZE": str(size)}))
        for (owner, name), value in patches.items():
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def plant(fault: str) -> None:
    """Break the norm of every layer, or its call of the flash operators."""
    forward = norm.RMSNorm.forward

    def reads(self: Any, x: torch.Tensor) -> torch.Tensor:
        return forward(self, x) * float(x.flatten()[0])

    def mixes(self: Any, x: torch.Tensor) -> torch.Tensor:
        return forward(self, x) + torch.zeros(x.shape, device="cpu", dtype=x.dtype)

    def widens(self: Any, x: torch.Tensor) -> torch.Tensor:
        return forward(self, x).float()

    if fault in ("item", "cpu", "float32"):
        norm.RMSNorm.forward = {"item": reads, "cpu": mixes, "float32": widens}[fault]
        return
    operators = flash.aten_operators()

    def swaps_boundaries(*args: Any, **kwargs: Any) -> Any:
        return operators.forward(*args[:3], args[4], args[3], *args[5:], **kwargs)

    def swaps_in_backward(*args: Any, **kwargs: Any) -> Any:
        return operators.backward(*args[:6], args[7], args[6], *args[8:], **kwargs)

    def strides(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)

    def strides_keys(q: torch.Tensor, k: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return operators.forward(q, strides(k), *args, **kwargs)

    broken = {
        "order": operators._replace(forward=swaps_boundaries),
        "order in backward": operators._replace(backward=swaps_in_backward),
        "strides": operators._replace(forward=strides_keys),
    }[fault]
    flash.aten_operators = lambda: broken


def main(config: str, size: str, fault: str | None = None) -> None:
    settings = parse_config(json.loads(Path(config).read_text()))
    if fault is not None:
        plant(fault)
    with fake_device() as waits, replaced(waits, int(size)), contextlib.suppress(Ended):
        run.train(settings)
    report = {"waits": waits.counts, "launched": waits.launched, "kernels": waits.kernels}
    if "engine_overlap" in sys.modules:
        overlap = sys.modules["engine_overlap"]
        report["buffers"] = [(x.shape, str(x.dtype)) for x in overlap.MADE]
        report["buffers_used"] = Counter(overlap.USED)
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
