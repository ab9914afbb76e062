"""Every Triton kernel against the elementary operations that define it, in Triton's interpreter.

    TRITON_INTERPRET=1 python interpreted.py      prints {case: "" or what differs} as JSON

A program of its own, because Triton reads the variable when it is imported. `break` as argument
makes every kernel wrong, to show that the comparison notices.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prefix.attention.plan import build_path_plan
from megatron_prefix.attention.rotary import Rotation, rotate
from megatron_prefix.kernels import launching, rotary, segments, softmax, swiglu
from megatron_prefix.layout import TreeLayout
from megatron_prefix.model.layers.swiglu import _FusedSwiGLU, _SwiGLU
from megatron_prefix.model.logps import token_logps, vocab_parallel_logps

torch.manual_seed(1)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def difference(name: str, fused: Tensor, defined: Tensor, rounding: float) -> str:
    """What differs by more than `rounding` of the largest entry; 0: the same bits."""
    if fused.shape != defined.shape or fused.dtype != defined.dtype:
        return f"{name}: {fused.dtype} {tuple(fused.shape)}"
    most = (fused.double() - defined.double()).abs().max().item()
    bound = rounding * defined.double().abs().max().item()
    return f"{name}: {most} above {bound}; " if not most <= bound else ""


def both(function: Callable[..., Tensor], inputs: list[Tensor], rounding: float) -> str:
    """Compare `function(is_fused, *inputs)` fused and elementary, with the inputs' gradients."""
    results = []
    grad: Tensor | None = None
    for is_fused in (True, False):
        own = [x.detach().clone().requires_grad_() for x in inputs]
        out = function(is_fused, *own)
        grad = torch.randn_like(out) if grad is None else grad
        results.append([out.detach(), *torch.autograd.grad(out, own, grad)])
    names = ["output", *(f"gradient {i}" for i in range(len(inputs)))]
    return "".join(map(difference, names, *results, [rounding] * len(names)))


def rotary_case(dtype: torch.dtype, interleaved: bool, head_dim: int, pairs: int) -> str:
    angles = torch.rand(5, 1, pairs) * 9
    rotation = Rotation(angles.cos(), angles.sin(), interleaved)
    x = torch.randn(5, 1, 6, 2 * head_dim)[:, 0, :, :head_dim].to(dtype)  # rows with gaps

    def turn(is_fused: bool, x: Tensor) -> Tensor:
        return rotate(x, rotation._replace(is_fused=is_fused))

    return both(turn, [x], 0 if dtype is torch.bfloat16 else 2**-23)


def sums_case(dtype: torch.dtype, layout: TreeLayout) -> str:
    plan = build_path_plan(layout, "cpu")
    copies = torch.randn(len(plan.kv_index), 3, 200).to(dtype)
    return difference("sums", plan.sum_copies(copies, True), plan.sum_copies(copies), 0)


def gate_case(dtype: torch.dtype, channels: int) -> str:
    def gate(is_fused: bool, x: Tensor) -> Tensor:
        return (_FusedSwiGLU if is_fused else _SwiGLU).apply(x)

    rounding = 2**-8 if dtype is torch.bfloat16 else 2**-21
    return both(gate, [torch.randn(3, 1, 2 * channels).to(dtype)], rounding)


def head_case(dtype: torch.dtype, columns: int, vocab_size: int) -> str:
    logit_N = torch.tensor([0, 0, 2, 3, 3, 3])  # row 1 has no target, row 3 one target twice
    target_N = torch.tensor([0, 5, vocab_size - 1, 4, 4, 1])

    def head(is_fused: bool, logits: Tensor) -> Tensor:
        return vocab_parallel_logps(logits, logit_N, target_N, vocab_size, None, is_fused)

    rounding = 2**-8 if dtype is torch.bfloat16 else 2**-21
    return both(head, [4 * torch.randn(4, columns).to(dtype)], rounding)


def chunks_case() -> str:
    weight = torch.randn(50, 8)
    logit_N, target_N = torch.tensor([0, 1, 1, 2, 4]), torch.tensor([3, 1, 7, 2, 30])

    def head(is_fused: bool, hidden: Tensor) -> Tensor:
        options: dict[str, Any] = dict(vocab_size=48, chunk_size=2, is_fused=is_fused)
        return token_logps(hidden, lambda x: x @ weight.T, logit_N, target_N, **options)

    return both(head, [torch.randn(5, 8)], 2**-20)


def on_rank(rank: int, logits: Tensor, store: str, queue: Any) -> None:
    """The head with half of the vocabulary, 17 of 20 columns are tokens: rank 1 has padding."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    own = logits.chunk(2, dim=1)[rank].contiguous().requires_grad_()
    logps = vocab_parallel_logps(own, *RANK_TARGETS, 17, dist.group.WORLD, True)
    (grad,) = torch.autograd.grad(logps @ torch.arange(1.0, 5.0), own)
    queue.put((rank, logps.detach().numpy(), grad.numpy()))
    dist.destroy_process_group()


RANK_TARGETS = torch.tensor([0, 0, 1, 2]), torch.tensor([3, 16, 10, 9])


def ranks_case() -> str:
    context = mp.get_context("fork")
    logits, queue = 4 * torch.randn(3, 20), context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = logits, f"{folder}/store", queue
        ranks = [context.Process(target=on_rank, args=(i, *arguments)) for i in range(2)]
        for rank in ranks:
            rank.start()
        parts = sorted((queue.get(timeout=60) for _ in ranks), key=lambda x: x[0])
        for rank in ranks:
            rank.join()
    whole = logits.requires_grad_()
    logps = vocab_parallel_logps(whole, *RANK_TARGETS, 17)
    (grad,) = torch.autograd.grad(logps @ torch.arange(1.0, 5.0), whole)
    joined = torch.cat([torch.from_numpy(x[2]) for x in parts], dim=1)
    faults = difference("gradient", joined, grad, 2**-21)
    for _, own, _ in parts:
        faults += difference("output", torch.from_numpy(own), logps.detach(), 2**-21)
    return faults


def layouts() -> dict[str, TreeLayout]:
    tree = TreeLayout.from_parents([3, 2, 4, 1], [-1, 0, 0, 2])
    return {
        "tree": TreeLayout.concat([tree, TreeLayout.from_parents([2], [-1]), tree]),
        "deep": TreeLayout.from_parents([1, 1, 2, 1, 3], [-1, 0, 1, 1, 0]),
    }


def cases() -> dict[str, Callable[[], str]]:
    every: dict[str, Callable[[], str]] = {"head over ranks": ranks_case}
    every["head in chunks"] = chunks_case
    for name, dtype in DTYPES.items():
        for pairs in ((False, 16, 8), (True, 16, 8), (False, 20, 6), (True, 13, 5)):
            every[f"rotary {name} {pairs}"] = lambda d=dtype, p=pairs: rotary_case(d, *p)
        for kind, layout in layouts().items():
            every[f"sums {name} {kind}"] = lambda d=dtype, x=layout: sums_case(d, x)
        for channels in (24, 1500):
            every[f"gate {name} {channels}"] = lambda d=dtype, c=channels: gate_case(d, c)
        for sizes in ((64, 60), (5000, 5000), (8, 8)):
            every[f"head {name} {sizes}"] = lambda d=dtype, s=sizes: head_case(d, *s)
    return every


def round_to_nearest() -> None:
    """Let the interpreter round float32 to bfloat16 as the device does; it cuts digits off."""
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source.name, target.name) != ("fp32", "bf16"):
            return convert(data, source, target, mode)
        values = torch.from_numpy(np.ascontiguousarray(data, np.float32)).to(torch.bfloat16)
        return values.view(torch.int16).numpy().view(np.uint16)

    interpreter._convert_float = rounded


def break_kernels() -> None:
    """Let every launch write a number that is a little wrong."""
    for module in (rotary, segments, softmax, swiglu):

        def broken(kernel: Any, grid: tuple, *args: Any, **constants: Any) -> None:
            launching.launch(kernel, grid, *args, **constants)
            floats = [x for x in args if isinstance(x, Tensor) and x.is_floating_point()]
            floats[-1].mul_(1.01)

        module.launch = broken


def main() -> None:
    if sys.argv[1:] == ["break"]:
        break_kernels()
    np.seterr(all="ignore")
    round_to_nearest()
    print(json.dumps({name: case() for name, case in cases().items()}))


if __name__ == "__main__":
    main()
