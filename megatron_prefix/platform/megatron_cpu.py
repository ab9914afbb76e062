"""Megatron-Core on a machine without CUDA.

`adapted()` is a context manager. Without CUDA it changes the calls below so that they run on CPU,
and restores them on exit. With CUDA it does nothing. Paths are relative to megatron/core, lines
those of 0.16.1, 0.18.2 and 0.19.2.

| change | needed by |
| --- | --- |
| `device="cuda"` of tensor factories -> cpu | schedules.py:596, 669, 749; optimizer.py |
| `Tensor.cuda()` returns the tensor | distrib_optimizer.py:1089, 1318, 1374 |
| `Tensor.type()` gives CPU tensors CUDA names | clip_grads.py:167, 178, 174; optimizer.py |
| `torch.cuda.current_device()` -> cpu | rotary_pos_embedding.py:162, mappings.py:91 |
| `torch.cuda.synchronize()` does nothing | p2p_communication.py:242, 263, 263 |
| `torch.cuda.current_stream()` -> None | param_and_grad_buffer.py:-, -, 632 |
| the CUDA random state is empty | random.py:55, 110, 118, where recomputation saves it |
| the token dispatcher has no side stream | moe/token_dispatcher.py:444, 450, 468 |
| its split sizes become lists, as gloo needs | moe/token_dispatcher.py:862, 893, 913 |
| parts of unequal length are gathered by all-to-all | mappings.py:114, 114, 118, for gloo |
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class _CudaNamesOnCpu(TorchFunctionMode):
    """Replace `device="cuda"` by CPU, and let `Tensor.type()` answer as on CUDA."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Inside a nested context the name is already changed.
            return "torch.cuda." + func(*args).removeprefix("torch.").removeprefix("cuda.")
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs = {**kwargs, "device": CPU}
        return func(*args, **kwargs)


def _splits_as_lists(dispatcher, point: str, tokens_per_expert=None):
    """In place of the dispatcher's copy of its split sizes to the host: lists, without a stream."""
    if point == dispatcher.cuda_dtoh_point:
        for name in ("input_splits", "output_splits"):
            splits = getattr(dispatcher, name)
            setattr(dispatcher, name, None if splits is None else splits.tolist())
    return tokens_per_expert


def _gather_unequal(original, input_, group, output_split_sizes=None, use_global_buffer=False):
    """The parts of all ranks, one after another; their lengths may differ."""
    if output_split_sizes is None or group.size() == 1:
        return original(input_, group, output_split_sizes, use_global_buffer)
    gathered = input_.new_empty(sum(output_split_sizes), *input_.shape[1:])
    copies = torch.cat([input_] * group.size())
    own = [len(input_)] * group.size()
    dist.all_to_all_single(gathered, copies, output_split_sizes, own, group=group)
    return gathered


@contextlib.contextmanager
def adapted() -> Iterator[None]:
    """Run Megatron-Core on CPU inside the context, if there is no CUDA. May be nested."""
    if torch.cuda.is_available():
        yield
        return
    from megatron.core.tensor_parallel import mappings
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    dispatcher = MoEAlltoAllTokenDispatcher
    gather = partial(_gather_unequal, mappings._gather_along_first_dim)
    no_state = torch.empty(0, dtype=torch.uint8)
    with (
        _CudaNamesOnCpu(),
        mock.patch.object(torch.cuda, "current_device", lambda: CPU),
        mock.patch.object(torch.cuda, "synchronize", lambda device=None: None),
        mock.patch.object(torch.cuda, "current_stream", lambda device=None: None),
        mock.patch.object(torch.cuda.random, "get_rng_state", lambda device="cuda": no_state),
        mock.patch.object(torch.cuda, "get_rng_state", lambda device="cuda": no_state),
        mock.patch.object(megatron_random, "_set_cuda_rng_state", lambda *_, **__: None),
        mock.patch.object(dispatcher, "cuda_dtoh_stream", "none on CPU"),
        mock.patch.object(mappings, "_gather_along_first_dim", gather),
        mock.patch.object(dispatcher, "_maybe_dtoh_and_synchronize", _splits_as_lists),
    ):
        yield


def device() -> torch.device:
    """The device on which this process computes: its current CUDA device, or CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else CPU
