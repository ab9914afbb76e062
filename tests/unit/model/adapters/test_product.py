"""The product of the low-rank factors against its definition, for every layout of fused layers."""

from __future__ import annotations

import pytest
import torch

from megatron_prefix.model.adapters.product import add_products, low_products

FUSED = {  # groups, and the channels of each adapter in one of them
    "one layer": (1, [(0, 6)]),
    "gate and up": (1, [(0, 5), (5, 10)]),
    "only up": (1, [(5, 10)]),
    "query, key, value": (3, [(0, 4), (4, 6), (6, 8)]),
    "query and value": (3, [(0, 4), (6, 8)]),
}


def inputs(name: str, num_tokens: int = 7, rank: int = 3):
    groups, spans = FUSED[name]
    width = {"one layer": 6, "gate and up": 10, "only up": 10}.get(name, 8)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    factors = [draw(groups * (stop - start), rank).requires_grad_() for start, stop in spans]
    output = draw(num_tokens, 1, groups * width).requires_grad_()
    low = draw(num_tokens, 1, len(spans) * rank).requires_grad_()
    return output, low, factors, spans, groups


def by_definition(output, low, factors, spans, groups):
    """Group by group: each adapter's own product, added to its channels."""
    parts = list(output.unflatten(-1, (groups, -1)).unbind(-2))
    for index, ((start, stop), factor) in enumerate(zip(spans, factors, strict=True)):
        rank = factor.size(1)
        own = low[..., index * rank : (index + 1) * rank]
        products = (own @ factor.T).unflatten(-1, (groups, -1))
        for group in range(groups):
            before, after = parts[group][..., :start], parts[group][..., stop:]
            middle = parts[group][..., start:stop] + products[..., group, :]
            parts[group] = torch.cat([before, middle, after], -1)
    return torch.stack(parts, -2).flatten(-2)


@pytest.mark.parametrize("name", FUSED)
def test_values_and_gradients_are_those_of_the_definition(name):
    output, low, factors, spans, groups = inputs(name)
    expected = by_definition(output, low, factors, spans, groups)
    # the memory of the first argument is written, as that of a linear layer's output is
    total = add_products(output * 1, low, factors, spans, groups)
    assert torch.allclose(total, expected, rtol=0, atol=1e-12)
    weights = torch.randn(total.shape, dtype=torch.float64)
    leaves = [output, low, *factors]
    ours = torch.autograd.grad((total * weights).sum(), leaves)
    theirs = torch.autograd.grad((expected * weights).sum(), leaves)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("needs_gradient", [True, False])
def test_the_input_of_a_layer_gets_the_gradients_of_both(needs_gradient):
    """Those of the frozen layer and of its adapters, and of what else the input goes to."""
    generator = torch.Generator().manual_seed(0)
    shapes = (7, 1, 5), (6, 5), (4, 5), (7, 1, 6), (7, 1, 4)
    x, factor, weight, *grads = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in (shapes[0], shapes[2], shapes[1], *shapes[3:])
    )
    x.requires_grad_(needs_gradient)
    leaves = [factor.requires_grad_(), *([x] if needs_gradient else [])]

    def gradients(own, low) -> tuple[torch.Tensor, ...]:
        total = (own @ weight.T * grads[0]).sum() + (low * grads[1]).sum() + x.square().sum()
        return torch.autograd.grad(total, leaves)

    own, low = low_products(x, factor)
    assert torch.equal(own, x) and torch.allclose(low, x @ factor.T, rtol=0, atol=1e-12)
    for a, b in zip(gradients(own, low), gradients(x, x @ factor.T), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_an_expert_without_tokens_gets_a_gradient_of_zero():
    _, _, factors, spans, groups = inputs("gate and up")
    output = torch.zeros(0, 10, dtype=torch.float64)
    low = torch.zeros(0, 6, dtype=torch.float64, requires_grad=True)
    add_products(output, low, factors, spans, groups).sum().backward()
    first = torch.zeros(6, 4, dtype=torch.float64, requires_grad=True)
    own, low = low_products(torch.zeros(0, 4, dtype=torch.float64, requires_grad=True), first)
    (own.sum() + low.sum()).backward()
    factors.append(first)
    assert all(factor.grad is not None and not factor.grad.any() for factor in factors)


def test_a_view_that_a_function_returned_is_taken():
    """Without sequence parallelism a row-parallel layer returns the sum over ranks in place."""

    class InPlace(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x

        @staticmethod
        def backward(ctx, grad):
            return grad

    output, low, factors, spans, groups = inputs("one layer")
    expected = by_definition(output, low, factors, spans, groups)
    total = add_products(InPlace.apply(output * 1), low, factors, spans, groups)
    assert torch.allclose(total, expected, rtol=0, atol=1e-12)


def test_an_output_that_its_producer_saved_is_not_written_silently():
    output, low, factors, spans, groups = inputs("one layer")
    saved = output.exp()  # its backward pass reads its output
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        add_products(saved, low, factors, spans, groups).sum().backward()
