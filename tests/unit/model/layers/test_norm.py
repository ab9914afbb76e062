"""The norm of one operation equals torch's chain of elementary ones, values and gradients."""

from types import SimpleNamespace

import pytest
import torch

from megatron_prefix.model.layers.norm import RMSNorm

CONFIG = SimpleNamespace(sequence_parallel=False, layernorm_zero_centered_gamma=False)


def both(shape: tuple, dtype: torch.dtype, eps: float = 1e-5):
    generator = torch.Generator().manual_seed(0)
    ours, theirs = RMSNorm(CONFIG, shape[-1], eps), torch.nn.RMSNorm(shape[-1], eps=eps)
    weight = torch.randn(shape[-1], generator=generator, dtype=torch.float64)
    x, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    results = []
    for norm in (ours.to(dtype), theirs.to(dtype)):
        with torch.no_grad():
            norm.weight.copy_(weight)
        own = x.to(dtype).requires_grad_()
        out = norm(own)
        results.append((out, *torch.autograd.grad(out, (own, norm.weight), grad.to(dtype))))
    return results


@pytest.mark.parametrize("shape", [(7, 1, 16), (3, 5), (4, 1, 2, 6), (0, 1, 8)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_equals_torch(shape, dtype, tolerance):
    for ours, theirs in zip(*both(shape, dtype), strict=True):
        assert ours.dtype == theirs.dtype == dtype
        assert torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance)


def test_bfloat16_is_computed_wider():
    exact = both((64, 1, 256), torch.float64)[1]
    for ours, expected in zip(both((64, 1, 256), torch.bfloat16)[0], exact, strict=True):
        assert ours.dtype == torch.bfloat16
        scale = expected.abs().max()
        assert (ours.double() - expected).abs().max() <= 0.02 * scale


def test_eps_bounds_rows_of_zeros():
    norm = RMSNorm(CONFIG, 4, eps=1e-2).double()
    x = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    out = norm(x)
    out.sum().backward()
    assert torch.equal(out, torch.zeros_like(out)) and torch.allclose(
        x.grad, torch.tensor(10.0).double()
    )


def test_the_weight_is_marked_under_sequence_parallelism():
    for shared in (False, True):
        config = SimpleNamespace(sequence_parallel=shared, layernorm_zero_centered_gamma=False)
        norm = RMSNorm(config, 4)
        assert norm.weight.sequence_parallel is shared
