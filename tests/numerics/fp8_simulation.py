"""FP8 on CPU: the operands of every matrix product of the layers, quantised and read back.

A product y = x w^T has three quantised products, as Transformer Engine's layers have:

    forward            q(x) q(w)^T        rows of x are tokens
    gradient of x      q(g) q(w)
    gradient of w      q(g)^T q(x)        a sum over tokens: blocks run along the tokens

Scales are those of the recipe: of the whole tensor (`tensorwise`), of the same tensor in earlier
rows (`delayed`), or of blocks of 128 values along the sum (`blockwise`; of weights 128 x 128).

Shapes: T tokens, C input and F output channels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
BLOCK = 128


def quantised(x: Tensor, scales: Tensor, kind: torch.dtype) -> Tensor:
    """x * scales in FP8, read back; what is too large becomes the largest number."""
    most = LARGEST[kind]
    return (x * scales).clamp(-most, most).to(kind).to(x.dtype) / scales


def scale_of(amax: Tensor, kind: torch.dtype) -> Tensor:
    return torch.where(amax > 0, LARGEST[kind] / amax.clamp(min=1e-30), 1.0)


class Recipe:
    """Scales of one recipe; `delayed` keeps the largest maximum of every tensor by name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.history: dict[str, Tensor] = {}

    def __call__(self, name: str, x: Tensor, kind: torch.dtype = E4M3) -> tuple[Tensor, Tensor]:
        """`x` [rows, columns] quantised for a sum over its columns, and for one over its rows."""
        if self.name == "blockwise":
            sizes = [(BLOCK, BLOCK)] if name[0] == "w" else [(1, BLOCK), (BLOCK, 1)]
            both = [quantised(x, scale_of(_block_maxima(x, *y), kind), kind) for y in sizes]
            return both[0], both[-1]
        amax = x.abs().max()
        if self.name == "delayed":
            before = self.history.get(name, amax)
            amax, self.history[name] = before, torch.maximum(before, amax)
        one = quantised(x, scale_of(amax, kind), kind)
        return one, one


def _block_maxima(x: Tensor, rows: int, columns: int) -> Tensor:
    """The largest absolute value of each entry's block."""
    padded = torch.nn.functional.pad(x.abs(), (0, -x.size(1) % columns, 0, -x.size(0) % rows))
    blocks = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).amax(dim=(1, 3))
    whole = blocks.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return whole[: x.size(0), : x.size(1)]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, recipe, name):
        (x_rows, x_columns), (w_rows, w_columns) = (
            recipe(f"x {name}", x),
            recipe(f"w {name}", weight),
        )
        ctx.save_for_backward(x_columns, w_columns)
        ctx.recipe, ctx.name = recipe, name
        return x_rows @ w_rows.T

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_rows, grad_columns = ctx.recipe(f"g {ctx.name}", grad, E5M2)
        return grad_rows @ weight, grad_columns.T @ x, None, None


@contextlib.contextmanager
def in_fp8(model: torch.nn.Module, name: str) -> Iterator[None]:
    """The layers of `model` compute in FP8 by the recipe `name`, inside of the context."""
    recipe = Recipe(name)
    changed = []
    for path, module in model.named_modules():
        if ".layers." in path and isinstance(module, (ColumnParallelLinear, RowParallelLinear)):

            def forward(x: Tensor, *_: Any, own=module, path=path, **__: Any) -> tuple:
                y = _Product.apply(x.flatten(0, -2), own.weight, recipe, path)
                return y.unflatten(0, x.shape[:-1]), None

            module.forward = forward
            changed.append(module)
    assert changed
    try:
        yield
    finally:
        for module in changed:
            del module.forward
