"""A CUDA device that is not there: fake tensors on `cuda:0`, and what makes the host wait for it.

torch's own meta kernels check shapes, dtypes, devices and signatures of every operator. Values mean
nothing: whatever is read from the device is 1. With a build of torch with CUDA, driver.c is
preloaded; with one without, guard.cpp is, and only forward runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from contracts import check_call, check_launch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)
NAMES = {torch.float32: "Float", torch.float64: "Double", torch.bfloat16: "BFloat16"}
NAMES |= {torch.int64: "Long", torch.int32: "Int", torch.bool: "Bool"}
SIZED_BY_VALUES = {"nonzero", "masked_select", "_unique2", "unique_dim", "equal", "bincount"}
"""Operators whose result's size depends on values, so that the host has to read them."""
INDEXING = {"index", "index_put", "index_put_"}


class Properties:
    """Of an H100."""

    name, major, minor, multi_processor_count = "NVIDIA H100 80GB HBM3", 9, 0, 132
    total_memory = 80 << 30


class Idle:
    """A stream or an event, on which nothing happens."""

    device = CUDA

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def _nothing(self, *_: object) -> None:
        return None

    synchronize = wait = wait_stream = wait_event = record = record_event = _nothing

    def query(self) -> bool:
        return True


class DeviceNumbers(TorchFunctionMode):
    """`device=0` is the fake device too; torch would ask the driver for it."""

    def __torch_function__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if type(kwargs.get("device")) is int:
            kwargs["device"] = CUDA
        return func(*args, **kwargs)


class HostWaits(TorchDispatchMode):
    """Counts what makes the host wait for the device, by phase of the step and by place."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = "start"
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)
        self.launched: Counter[str] = Counter()
        """Operators on the device, by phase."""
        self.kernels: Counter[str] = Counter()
        """Launches of Triton kernels."""

    def during(self, phase: str, function: Callable) -> Callable:
        """`function`, whose operators count for `phase`."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            before, self.phase = self.phase, phase
            try:
                return function(*args, **kwargs)
            finally:
                self.phase = before

        return wrapped

    def note(self, kind: str) -> None:
        self.counts[self.phase][f"{kind}: {_place()}"] += 1

    def launch_kernel(self, kernel: Any, grid: tuple, *args: Any, **constants: Any) -> None:
        """In place of a Triton kernel's launch, which needs a device."""
        check_launch(kernel, args, constants)
        self.kernels[kernel.fn.__name__] += 1

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        device = kwargs.get("device")
        to = None if device is None else torch.device(device).type
        from_cuda = any(x.is_cuda for x in tensors)
        check_call(name, args, kwargs)
        self.launched[self.phase] += from_cuda
        if name in ("_local_scalar_dense", "item"):
            if from_cuda:
                self.note("item")
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 1)
        if from_cuda and (name in SIZED_BY_VALUES or _repeats_unknown(name, kwargs)):
            self.note(name)
        if from_cuda and name in INDEXING and _is_masked(args[1]):
            self.note(f"{name} by a mask")
        if name == "_to_copy" and from_cuda and to == "cpu":
            self.note("copy to the host")
        if name == "_to_copy" and not from_cuda and to == "cuda" and not kwargs.get("non_blocking"):
            self.note("copy from the host")
        if func.namespace == "c10d" and name.endswith("coalesced_"):  # has no meta kernel
            from torch._C._distributed_c10d import FakeWork

            return FakeWork().boxed()
        return func(*args, **kwargs)


def _repeats_unknown(name: str, kwargs: dict) -> bool:
    return name == "repeat_interleave" and kwargs.get("output_size") is None


def _is_masked(indices: Any) -> bool:
    return any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in indices or ())


def _place() -> str:
    """The innermost line of the product that led here, else of Megatron-Core."""
    places = []
    for frame in reversed(traceback.extract_stack()):
        for root in ("megatron_prefix/", "megatron/core/"):
            if f"/{root}" in frame.filename:
                places.append(f"{root}{frame.filename.rpartition(f'/{root}')[2]}:{frame.lineno}")
    own = [x for x in places if x.startswith("megatron_prefix")]
    return next(iter([*places[:1], *own[:1]]), "torch")


def new_parameters(module: torch.nn.Module, function: Callable, recurse: bool = True) -> Any:
    """`Module._apply`, but every parameter that moves becomes a new one: fake ones cannot be
    swapped in place."""
    for child in module.children():
        new_parameters(child, function)
    for name, old in module._parameters.items():
        if old is None:
            continue
        with torch.no_grad():
            moved = function(old)
        if moved is not old:
            made = torch.nn.Parameter(moved, old.requires_grad)
            for key, value in vars(old).items():  # Megatron-Core's marks
                vars(made).setdefault(key, value)
            module._parameters[name] = made
    for name, old in module._buffers.items():
        module._buffers[name] = None if old is None else function(old)
    return module


def _patches() -> dict[tuple[Any, str], Any]:
    """What torch and Megatron-Core are told about the device: (object, name) -> value."""
    import megatron.core.tensor_parallel.random as megatron_random

    state = torch.empty(16, dtype=torch.uint8)
    answers = {
        "is_available": True,
        "device_count": 8,
        "current_device": 0,
        "get_device_capability": (9, 0),
        "get_device_name": Properties.name,
        "get_device_properties": Properties,
        "is_current_stream_capturing": False,
        "get_rng_state": state,
        "memory_allocated": 0,
    }
    silent = ("set_device", "synchronize", "manual_seed", "manual_seed_all", "set_rng_state")
    silent += ("empty_cache", "_lazy_init")
    answers |= dict.fromkeys(silent)
    patches: dict[tuple[Any, str], Any] = {
        (torch.cuda, name): lambda *_, value=value, **__: value for name, value in answers.items()
    }
    own_type, tensor = torch.Tensor.type, torch.Tensor

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not self.is_cuda:
            return own_type(self, *args, **kwargs)
        return f"torch.cuda.{NAMES.get(self.dtype, 'Other')}Tensor"

    return patches | {
        (torch.cuda, "Stream"): Idle,
        (torch.cuda, "Event"): Idle,
        (torch.cuda, "current_stream"): Idle,
        (torch.cuda, "default_stream"): Idle,
        (torch.cuda, "stream"): lambda stream: contextlib.nullcontext(),
        (torch.cuda.random, "get_rng_state"): lambda *_, **__: state,
        (megatron_random, "_set_cuda_rng_state"): lambda *_, **__: None,
        (torch.backends.cuda, "is_flash_attention_available"): lambda: True,
        (tensor, "pin_memory"): lambda self, *_: self,
        (tensor, "record_stream"): lambda self, *_: None,
        (tensor, "cuda"): lambda self, *_, **__: self.to(CUDA),
        (tensor, "type"): type_name,
        (torch.nn.Module, "_apply"): new_parameters,
        (FakeTensorMode, "avoid_device_init"): True,
        (sys.modules["torch._subclasses.fake_tensor"], "init_gpu_context"): lambda *_: None,
    }


def _put_guard() -> None:
    if torch.version.cuda is None:
        ctypes.CDLL(os.environ["FAKE_CUDA_LIBRARY"]).put_guard()
        return
    torch._C._ensureCUDADeviceGuardSet()
    ctypes.CDLL(None).set_devices(64)


@contextlib.contextmanager
def claimed_device() -> Iterator[None]:
    """Inside the context torch says that there are devices."""
    with contextlib.ExitStack() as stack:
        for (owner, name), value in _patches().items():
            stack.enter_context(mock.patch.object(owner, name, value))
        _put_guard()
        yield


@contextlib.contextmanager
def fake_device() -> Iterator[HostWaits]:
    """Inside the context all tensors are fake, and `cuda` is a device."""
    waits = HostWaits()
    engine = torch.autograd._engine_run_backward

    def backward(*args: Any, **kwargs: Any) -> Any:  # Python in backward is outside of other modes
        with DeviceNumbers():
            return engine(*args, **kwargs)

    with contextlib.ExitStack() as stack:
        stack.enter_context(claimed_device())
        stack.enter_context(mock.patch.object(torch.autograd, "_engine_run_backward", backward))
        stack.enter_context(DeviceNumbers())
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield stack.enter_context(waits)
