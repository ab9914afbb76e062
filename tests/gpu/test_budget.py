"""The budget itself, on CPU: rounding passes on every forest, wrong results fail."""

import pytest
import torch
from budget import FORESTS, assert_within_budget, check_backend, forward_backward, mask_of, terms_of

from megatron_prefix.attention import TreePlan
from megatron_prefix.attention.backends.dense import masked_attention
from megatron_prefix.testing import random_heads

HEADS = (4, 2, 64)


def case(forest):
    """Inputs in bfloat16, the mask, and the scale."""
    plan = TreePlan(FORESTS[forest], "cpu")
    return random_heads(plan.num_queries, *HEADS, dtype=torch.bfloat16), mask_of(plan), 0.125


def like_a_kernel(low, mask, scale):
    """Attention as kernels compute it: sums in float32, weights, scores' gradients and the output
    rounded to bfloat16 in between."""
    q, k, v, grad = (x.detach().float() for x in low)
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))

    def rounded(x):
        return x.bfloat16().float()

    scores = (torch.einsum("qnh,knh->nqk", q, k) * scale).masked_fill(~mask, float("-inf"))
    weights = scores.softmax(-1)
    out = rounded(torch.einsum("nqk,knh->qnh", rounded(weights), v))
    through = torch.einsum("qnh,knh->nqk", grad, v)
    mean = rounded((grad * out).sum(-1)).T.unsqueeze(-1)
    d_scores = rounded(weights * (through - mean))
    dq = scale * torch.einsum("nqk,knh->qnh", d_scores, k)
    dk = scale * torch.einsum("nqk,qnh->knh", d_scores, q)
    dv = torch.einsum("nqk,qnh->knh", rounded(weights), grad)
    groups = (len(dk), HEADS[1], -1, HEADS[2])
    dk, dv = (x.reshape(groups).sum(2) for x in (dk, dv))
    return [x.bfloat16() for x in (out, dq, dk, dv)]


@pytest.mark.parametrize("forest", FORESTS)
def test_other_roundings_pass(forest):
    check_backend("path", FORESTS[forest], HEADS, torch.bfloat16, device="cpu")
    settings = {"window": 40, "softcap": 2.0, "has_sinks": True}
    check_backend("path", FORESTS[forest], HEADS, torch.bfloat16, device="cpu", **settings)
    low, mask, scale = case(forest)
    assert_within_budget(like_a_kernel(low, mask, scale), low, mask, scale)


WRONG = {
    "a softmax that is not differentiated": lambda mask, scale: terms_of(mask, scale),
    "another scale": lambda mask, scale: (
        lambda q, k, v: masked_attention(q, k, 1.05 * v, mask, scale)
    ),
    "every token before": lambda mask, scale: (
        lambda q, k, v: masked_attention(q, k, v, torch.ones_like(mask).tril(), scale)
    ),
    "another order of heads": lambda mask, scale: (
        lambda q, k, v: masked_attention(q, k, v.flip(1), mask, scale)
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("forest", [x for x in FORESTS if x != "long"])
def test_wrong_results_fail(forest, wrong):
    low, mask, scale = case(forest)
    wrong_results = forward_backward(WRONG[wrong](mask, scale), *low)
    with pytest.raises(AssertionError, match=" > "):
        assert_within_budget(wrong_results, low, mask, scale)
