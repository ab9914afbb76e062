"""Tests of flash alone: torch's operators, and the versions of FlashAttention that they call."""

import numpy as np
import pytest
import torch
from budget import (
    DTYPES,
    FORESTS,
    assert_within_budget,
    check_backend,
    forward_backward,
    needs_cuda,
)

from megatron_prefix.attention import tree_attention
from megatron_prefix.attention.api import resolve_backend
from megatron_prefix.attention.backends.flash import aten_operators
from megatron_prefix.attention.backends.flash_versions import (
    active_version,
    flash_version,
    why_not_version,
)
from megatron_prefix.attention.plan import build_path_plan
from megatron_prefix.layout import TreeLayout
from megatron_prefix.testing import random_heads

pytestmark = needs_cuda


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_groups", [8, 2, 1])
def test_aten_flash_operators_align_bottom_right_with_gqa_in_backward(num_groups, dtype):
    """The operators alone, no plan: 5 < 12, 130 < 300 and 64 = 64 queries against keys."""
    q_lengths, kv_lengths = [5, 130, 64, 1], [12, 300, 64, 70]
    cu_q, cu_kv = (
        torch.tensor([0, *np.cumsum(x)], dtype=torch.int32, device="cuda")
        for x in (q_lengths, kv_lengths)
    )
    heads = (8, num_groups, 64)
    q, _, _, grad_out = random_heads(sum(q_lengths), *heads, dtype=dtype, device="cuda")
    _, k, v, _ = random_heads(sum(kv_lengths), *heads, seed=1, dtype=dtype, device="cuda")
    q_piece = torch.repeat_interleave(torch.arange(4), torch.tensor(q_lengths))
    kv_piece = torch.repeat_interleave(torch.arange(4), torch.tensor(kv_lengths))
    from_last_q = torch.cat([torch.arange(n - 1, -1, -1) for n in q_lengths])
    from_last_kv = torch.cat([torch.arange(n - 1, -1, -1) for n in kv_lengths])
    mask = (q_piece[:, None] == kv_piece) & (from_last_kv >= from_last_q[:, None])
    mask = mask.cuda()

    forward, backward = aten_operators()
    with torch.no_grad():
        out, lse, rng_state, unused, _ = forward(
            q, k, v, cu_q, cu_kv, 130, 300, 0.0, True, False, scale=0.125
        )
        grads = backward(
            grad_out, q, k, v, out, lse, cu_q, cu_kv, 130, 300, 0.0, True, rng_state, unused,
            scale=0.125,
        )  # fmt: skip

    assert [x.shape for x in grads] == [q.shape, k.shape, v.shape]
    assert_within_budget((out, *grads), (q, k, v, grad_out), mask)


def test_a_leaky_mask_exceeds_the_budget():
    layout = TreeLayout.from_parents([60, 40, 50], [-1, 0, 0])
    low = random_heads(150, 4, 2, 64, dtype=torch.bfloat16, device="cuda")
    leaky = torch.ones(150, 150, dtype=torch.bool, device="cuda").tril()
    flash = forward_backward(lambda *x: tree_attention(*x, layout, "flash"), *low)
    with pytest.raises(AssertionError, match="out: .* > "):
        assert_within_budget(flash, low, leaky)


def test_copy_sum_on_the_device_equals_the_one_on_cpu():
    layout = FORESTS["deep"]
    plans = [build_path_plan(layout, device) for device in ("cpu", "cuda")]
    torch.manual_seed(0)
    copies = torch.randn(len(plans[0].kv_index), 2, 64).bfloat16()
    on_cpu, on_device = plans[0].sum_copies(copies), plans[1].sum_copies(copies.cuda())
    assert torch.equal(on_cpu, on_device.cpu())


def test_auto_is_flash_here():
    assert resolve_backend("auto", "cuda", torch.bfloat16) == "flash"
    assert resolve_backend("auto", "cuda", torch.float32) == "path"
    q, k, v, _ = random_heads(9, 4, 2, 20, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(ValueError, match="multiple of 8"):
        tree_attention(q, k, v, TreeLayout.from_parents([3, 2, 4], [-1, 0, 0]), "flash")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("version", [3, 4])
def test_other_versions_equal_dense(version, head_dim, dtype):
    if obstacle := why_not_version(version, "cuda"):
        pytest.skip(f"FlashAttention-{version}: {obstacle}")
    with flash_version(version):
        assert active_version() == version
        for forest in ("pairs", "deep", "long"):
            check_backend("flash", FORESTS[forest], (8, 2, head_dim), dtype)
    assert active_version() == 2
