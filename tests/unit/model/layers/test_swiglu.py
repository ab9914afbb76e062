"""The gate as one operation equals silu(gate) * up, values and gradients."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from megatron_prefix.model.layers.swiglu import SwiGLU

CONFIG = SimpleNamespace(gated_linear_unit=True, activation_func=F.silu)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-6)])
@pytest.mark.parametrize("shape", [(7, 1, 12), (3, 2), (0, 1, 4)])
def test_equals_elementary_operations(dtype, tolerance, shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    grad = torch.randn(*shape[:-1], shape[-1] // 2, generator=generator).to(dtype)
    gate, up = x.chunk(2, dim=-1)
    expected = F.silu(gate) * up
    output = SwiGLU(CONFIG)(x)
    assert output.dtype == dtype
    assert torch.allclose(output, expected, rtol=tolerance, atol=tolerance)
    ours, theirs = (torch.autograd.grad(y, x, grad)[0] for y in (output, expected))
    assert torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance)


def test_other_activations_are_refused():
    for wrong in ({"gated_linear_unit": False}, {"activation_func": F.gelu}):
        with pytest.raises(ValueError, match="gated_linear_unit"):
            SwiGLU(SimpleNamespace(**{**vars(CONFIG), **wrong}))
