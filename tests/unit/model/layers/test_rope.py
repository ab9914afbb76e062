"""Rotary angles by position against a rotation of complex numbers."""

import pytest
import torch

from megatron_prefix.attention.rotary import rotate, rotation_of
from megatron_prefix.layout import TreeLayout
from megatron_prefix.model.layers.rope import rotary_angles


def complex_rotation(x, positions, base):
    """Channels i and i + D/2 are one complex number, turned by position * base^(-2i/D)."""
    half = x.size(-1) // 2
    z = torch.complex(x[..., :half], x[..., half:])
    frequencies = torch.tensor(
        [base ** (-2 * i / x.size(-1)) for i in range(half)], dtype=torch.float64
    )
    turn = torch.exp(1j * positions.double()[:, None] * frequencies)
    z = z * turn[:, None, :]
    return torch.cat([z.real, z.imag], dim=-1)


@pytest.mark.parametrize("base", [10000.0, 500000.0])
@pytest.mark.parametrize("head_dim", [2, 8, 64])
def test_equals_a_complex_rotation(head_dim, base):
    positions = torch.tensor([0, 1, 2, 5, 2, 3, 117])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 3, head_dim, generator=generator, dtype=torch.float64)
    angles = rotary_angles(positions, head_dim, base)
    assert angles.shape == (7, head_dim // 2) and angles.dtype == torch.float32
    ours = rotate(x, rotation_of(angles.double()))
    assert torch.allclose(ours, complex_rotation(x, positions, base), atol=1e-4)
    assert torch.equal(ours[0], x[0])


def test_megatron_core_rotates_the_same():
    from megatron.core.models.common.embeddings import rope_utils

    positions = torch.tensor([0, 4, 1, 1])
    x = torch.randn(4, 2, 6, generator=torch.Generator().manual_seed(1))
    angles = rotary_angles(positions, 6, 10000.0)
    twice = torch.cat([angles, angles], dim=-1)[:, None, None, :]
    theirs = rope_utils._apply_rotary_pos_emb_bshd(x[:, None], twice, rotary_interleaved=False)
    assert torch.allclose(rotate(x, rotation_of(angles)), theirs[:, 0], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_turn_back(dtype):
    positions = torch.tensor([3, 0, 11])
    rotation = rotation_of(rotary_angles(positions, 8, 100.0).double())
    x = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()
    turned = rotate(x, rotation)
    assert turned.dtype == dtype and turned.shape == x.shape
    (back,) = torch.autograd.grad(turned, x, turned.detach())
    assert torch.allclose(back, x, atol=5e-2 if dtype == torch.bfloat16 else 1e-6)
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(lambda y: rotate(y, rotation), x)


def test_siblings_repeat_their_angles():
    """Prompt of 3, responses of 2 and 4: both continue at position 3, at any place in the row."""
    layout = TreeLayout.from_parents([3, 2, 4], [-1, 0, 0])
    angles = rotary_angles(torch.from_numpy(layout.position_ids()), 8, 10000.0)
    assert torch.equal(angles[3:5], angles[5:7])
    assert not torch.equal(angles[3], angles[7])
    by_row = rotary_angles(torch.arange(9), 8, 10000.0)
    assert torch.equal(angles[:5], by_row[:5]) and torch.equal(angles[7], by_row[5])


def test_only_differences_of_positions_matter():
    generator = torch.Generator().manual_seed(2)
    q, k = (torch.randn(1, 1, 16, generator=generator, dtype=torch.float64) for _ in "qk")

    def score(at_q, at_k):
        turned = [
            rotate(x, rotation_of(rotary_angles(torch.tensor([at]), 16, 10000.0).double()))
            for x, at in ((q, at_q), (k, at_k))
        ]
        return (turned[0] * turned[1]).sum().item()

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert abs(score(7, 3) - score(8, 3)) > 1e-3
