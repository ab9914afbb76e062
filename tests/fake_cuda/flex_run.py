"""FlexAttention's graphs compiled for an H100, as a program of its own: prints them as JSON.

    LD_PRELOAD=…/libcuda.so.1 python flex_run.py FORM.json

A form is a call of `attention_backend: flex`. torch lowers its forward and backward passes on fake
tensors and has their kernels compiled by Triton; what they need is printed. No kernel is launched:
the program ends where torch would first run a graph.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import torch
import triton
from compiled import H100, MOST_SHARED, assembled
from fake_device import CUDA, Properties, claimed_device
from torch._dynamo.device_interface import CudaInterface
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor import output_code
from torch._inductor.fx_passes import joint_graph, post_grad
from torch._inductor.runtime import triton_helpers, triton_heuristics
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.driver import DriverBase

from megatron_prefix.attention import TreePlan
from megatron_prefix.attention.backends import Scoring, load_backend
from megatron_prefix.layout import TreeLayout


class Device(Properties):
    """What torch asks an H100 for when it chooses kernels."""

    warp_size, regs_per_multiprocessor = 32, 65_536
    max_threads_per_multi_processor, max_threads_per_block = 2048, 1024
    shared_memory_per_block, shared_memory_per_block_optin = 49_152, MOST_SHARED
    shared_memory_per_multiprocessor, L2_cache_size = 233_472, 50 << 20
    gcnArchName = ""


class Driver(DriverBase):
    """In place of Triton's driver, which needs a device."""

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> Any:
        return H100

    def get_active_torch_device(self) -> torch.device:
        return CUDA

    def get_benchmarker(self) -> Any:
        raise AssertionError("nothing is measured")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_device(self) -> int:
        return 0


class Ended(BaseException):
    """All graphs are compiled, and the first of them would run."""


def end(*_: Any, **__: Any) -> NoReturn:
    raise Ended


@contextlib.contextmanager
def compiling(kernels: list[dict]) -> Iterator[None]:
    """Inside, kernels are compiled for an H100 and listed, and graphs end where they would run."""
    compile_kernel = triton.compile

    def compile_and_list(source: Any, *args: Any, **kwargs: Any) -> Any:
        binary = compile_kernel(source, *args, **kwargs)
        ptx = binary.asm["ptx"]
        needs = assembled(ptx, binary.metadata.shared)
        kernels.append({"name": source.name, **needs._asdict()})
        return binary

    answers = {
        "get_device_properties": Device,
        "get_compute_capability": 90,
        "is_available": True,
        "current_device": 0,
        "device_count": 1,
        "get_raw_stream": 0,
    }
    patches: dict[tuple[Any, str], Any] = {
        (CudaInterface, name): staticmethod(lambda *_, value=value: value)
        for name, value in answers.items()
    }
    for name in ("current_device", "get_device_properties"):
        patches[CudaInterface.Worker, name] = patches[CudaInterface, name]
    patches |= {
        (torch.cuda, "get_device_properties"): lambda *_: Device,
        (torch.cuda, "_exchange_device"): lambda *_: 0,
        (torch.cuda, "_maybe_exchange_device"): lambda *_: 0,
        (joint_graph, "lazy_init"): lambda *_: None,  # patterns, traced on the device
        (post_grad, "lazy_init"): lambda *_: None,
        (triton, "compile"): compile_and_list,
        (triton_helpers, "set_driver_to_gpu"): lambda: None,
        (triton_heuristics.CachingAutotuner, "_make_launchers"): lambda self: None,
        (triton_heuristics.CachingAutotuner, "_dynamic_scale_rblock"): lambda self: None,
        (output_code.CompiledFxGraph, "__call__"): end,
    }
    triton.runtime.driver.set_active(Driver())
    with contextlib.ExitStack() as stack:
        for (owner, name), value in patches.items():
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(
            inductor_config.patch(compile_threads=1, fx_graph_cache=False, max_autotune=False)
        )
        settings = {"force_non_lazy_backward_lowering": True, "enable_autograd_cache": False}
        stack.enter_context(functorch_config.patch(settings))
        yield


def main(path: str) -> None:
    form = json.loads(Path(path).read_text())
    kernels: list[dict] = []
    heads, groups, dim, tokens = (form[key] for key in ("heads", "groups", "head_dim", "tokens"))
    third = tokens // 3
    layout = TreeLayout.from_parents([tokens - 2 * third, third, third], [-1, 0, 0])
    dtype = getattr(torch, form["dtype"])
    # without the other modes of `fake_device`, under which torch compiles nothing
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    with claimed_device(), compiling(kernels), fakes, contextlib.suppress(Ended):
        q, k, v = (
            torch.empty(tokens, n, dim, device="cuda", dtype=dtype).requires_grad_()
            for n in (heads, groups, groups)
        )
        sinks = torch.empty(heads, device="cuda").requires_grad_() if form["sinks"] else None
        scoring = Scoring(dim**-0.5, form["softcap"], sinks)
        plan = TreePlan(layout, q.device).windowed(form["window"])
        load_backend("flex").attend(q, k, v, plan, scoring)
    print(json.dumps(kernels))


if __name__ == "__main__":
    main(sys.argv[1])
