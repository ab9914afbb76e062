"""Rotary angles by position against a rotation of complex numbers."""

import pytest
import torch

from megatron_prefix.layout import TreeLayout
from megatron_prefix.model.rope import rotary_angles


def rotate(x, angles):
    """The half-split rotation: channel i turns with channel i + D/2."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return x * angles.cos() + turned * angles.sin()


def complex_rotation(x, positions, base):
    """Channels i and i + D/2 are one complex number, turned by position * base^(-2i/D)."""
    half = x.size(-1) // 2
    z = torch.complex(x[..., :half], x[..., half:])
    frequencies = torch.tensor(
        [base ** (-2 * i / x.size(-1)) for i in range(half)], dtype=torch.float64
    )
    turn = torch.exp(1j * positions.double()[:, None] * frequencies)
    z = z * turn[:, None, None, :]
    return torch.cat([z.real, z.imag], dim=-1)


@pytest.mark.parametrize("base", [10000.0, 500000.0])
@pytest.mark.parametrize("head_dim", [2, 8, 64])
def test_equals_a_complex_rotation(head_dim, base):
    positions = torch.tensor([0, 1, 2, 5, 2, 3, 117])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 1, 3, head_dim, generator=generator, dtype=torch.float64)
    angles = rotary_angles(positions, head_dim, base)
    assert angles.shape == (7, 1, 1, head_dim) and angles.dtype == torch.float32
    ours = rotate(x, angles.double())
    assert torch.allclose(ours, complex_rotation(x, positions, base), atol=1e-4)
    assert torch.equal(ours[0], x[0])


def test_megatron_core_rotates_by_them():
    from megatron.core.models.common.embeddings import rope_utils

    positions = torch.tensor([0, 4, 1, 1])
    x = torch.randn(4, 1, 2, 6, generator=torch.Generator().manual_seed(1))
    angles = rotary_angles(positions, 6, 10000.0)
    theirs = rope_utils._apply_rotary_pos_emb_bshd(x, angles, rotary_interleaved=False)
    expected = complex_rotation(x.double(), positions, 10000.0).float()
    assert torch.allclose(theirs, expected, atol=1e-6)


def test_siblings_repeat_their_angles():
    """Prompt of 3, responses of 2 and 4: both go on at position 3, whatever their rows."""
    layout = TreeLayout.from_parents([3, 2, 4], [-1, 0, 0])
    angles = rotary_angles(torch.from_numpy(layout.position_ids()), 8, 10000.0)
    assert torch.equal(angles[3:5], angles[5:7])
    assert not torch.equal(angles[3], angles[7])
    by_row = rotary_angles(torch.arange(9), 8, 10000.0)
    assert torch.equal(angles[:5], by_row[:5]) and torch.equal(angles[7], by_row[5])


def test_only_differences_of_positions_matter():
    generator = torch.Generator().manual_seed(2)
    q, k = (torch.randn(1, 1, 1, 16, generator=generator, dtype=torch.float64) for _ in "qk")

    def score(at_q, at_k):
        turned = [
            rotate(x, rotary_angles(torch.tensor([at]), 16, 10000.0).double())
            for x, at in ((q, at_q), (k, at_k))
        ]
        return (turned[0] * turned[1]).sum().item()

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert abs(score(7, 3) - score(8, 3)) > 1e-3
