"""Token and response log-probabilities against log_softmax in float64."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.functional import log_softmax

from megatron_prefix.model.logps import (
    response_logps,
    token_logps,
    vocab_parallel_collisions,
    vocab_parallel_logps,
    vocab_parallel_scales,
)

VOCAB, PADDED, HIDDEN = 11, 16, 6


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_targets(num_rows):
    """Several targets a row, one of them twice, and a row without a target; rows ascend."""
    rows = [row for row in range(num_rows) if row != 2 for _ in range(1 + row % 3)]
    targets = [(7 * i + 3) % VOCAB for i in range(len(rows))]
    rows.append(num_rows - 1)
    targets.append(targets[-1])
    return torch.tensor(rows), torch.tensor(targets)


def expected_logps(logits, rows, targets):
    return log_softmax(logits[:, :VOCAB], dim=-1)[rows, targets]


def test_values_and_gradients_equal_log_softmax():
    logits = draw(5, PADDED).requires_grad_()
    rows, targets = some_targets(5)
    ours = vocab_parallel_logps(logits, rows, targets, VOCAB)
    plain = expected_logps(logits, rows, targets)
    assert ours.dtype == torch.float64
    assert torch.allclose(ours, plain, rtol=0, atol=1e-13)
    weights = draw(len(rows), seed=1)
    (grad,) = torch.autograd.grad((weights * ours).sum(), logits)
    (expected,) = torch.autograd.grad((weights * plain).sum(), logits)
    assert torch.allclose(grad, expected, rtol=0, atol=1e-13)
    assert torch.equal(grad[2], torch.zeros(PADDED, dtype=torch.float64))


def test_a_repeated_target_adds_its_gradient_again():
    logits = draw(1, PADDED).requires_grad_()
    one, two = (
        torch.autograd.grad(
            vocab_parallel_logps(
                logits, torch.zeros(n, dtype=torch.long), torch.full((n,), 4), VOCAB
            ).sum(),
            logits,
        )[0]
        for n in (1, 2)
    )
    assert torch.allclose(two, 2 * one, rtol=0, atol=1e-14)


def test_gradcheck():
    rows, targets = some_targets(4)
    assert torch.autograd.gradcheck(
        lambda x: vocab_parallel_logps(x, rows, targets, VOCAB), draw(4, PADDED).requires_grad_()
    )


def test_padding_is_never_predicted_and_gets_no_gradient():
    logits = draw(3, PADDED)
    rows = torch.arange(3).repeat_interleave(VOCAB)
    targets = torch.arange(VOCAB).repeat(3)
    high = logits.clone()
    high[:, VOCAB:] = 1e4
    high.requires_grad_()
    before = high.detach().clone()
    ours = vocab_parallel_logps(high, rows, targets, VOCAB)
    assert torch.equal(high.detach(), before)  # the caller's logits are left alone
    assert torch.equal(ours, vocab_parallel_logps(logits, rows, targets, VOCAB))
    assert torch.allclose(ours.exp().view(3, VOCAB).sum(1), torch.ones(3, dtype=torch.float64))
    (draw(len(rows), seed=2) * ours).sum().backward()
    assert torch.equal(high.grad[:, VOCAB:], torch.zeros(3, PADDED - VOCAB, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_logits_give_float32(dtype):
    logits = draw(5, PADDED).mul(30).to(dtype).requires_grad_()
    rows, targets = some_targets(5)
    ours = vocab_parallel_logps(logits, rows, targets, VOCAB)
    plain = expected_logps(logits.detach().double(), rows, targets)
    assert ours.dtype == torch.float32
    assert torch.allclose(ours.double(), plain, rtol=1e-6, atol=1e-6)
    ours.sum().backward()
    assert logits.grad.dtype == dtype


@pytest.mark.parametrize("num_rows", [1, 4, 5, 6, 9])
def test_chunks_change_neither_values_nor_gradients(num_rows):
    rows, targets = some_targets(num_rows)
    weights = draw(len(rows), seed=4)
    results = []
    for chunk_size in (num_rows, 2, 3, 1):
        hidden = draw(num_rows, HIDDEN, seed=2).requires_grad_()
        head = draw(PADDED, HIDDEN, seed=3).requires_grad_()
        sizes = []

        def project(x, head=head, sizes=sizes):
            sizes.append(x.size(0))
            return x @ head.T

        offsets = np.searchsorted(rows.numpy(), np.arange(num_rows + 1)) if chunk_size > 1 else None
        logps = token_logps(
            hidden,
            project,
            rows,
            targets,
            vocab_size=VOCAB,
            chunk_size=chunk_size,
            offsets=offsets,
        )
        assert sum(sizes) == num_rows and max(sizes) <= chunk_size
        (weights * logps).sum().backward()
        results.append((logps.detach(), hidden.grad, head.grad))
    plain = expected_logps(hidden @ head.T, rows, targets)
    assert torch.allclose(results[0][0], plain, rtol=0, atol=1e-13)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-13)


def test_chunks_are_projected_again_in_backward():
    rows, targets = some_targets(6)
    calls = []

    def project(x):
        calls.append(x.size(0))
        return x @ torch.ones(HIDDEN, PADDED, dtype=torch.float64)

    hidden = draw(6, HIDDEN).requires_grad_()
    logps = token_logps(hidden, project, rows, targets, vocab_size=VOCAB, chunk_size=4)
    assert calls == [4, 2]
    logps.sum().backward()
    assert sorted(calls) == [2, 2, 4, 4]


@pytest.mark.parametrize("chunk_size", [1, 8])
def test_no_rows_give_no_logps_and_zero_gradients(chunk_size):
    hidden = draw(0, HIDDEN).requires_grad_()
    head = draw(PADDED, HIDDEN).requires_grad_()
    nothing = torch.zeros(0, dtype=torch.long)
    logps = token_logps(
        hidden, lambda x: x @ head.T, nothing, nothing, vocab_size=VOCAB, chunk_size=chunk_size
    )
    assert logps.shape == (0,)
    logps.sum().backward()
    assert torch.equal(head.grad, torch.zeros_like(head))


class TestResponseLogps:
    def test_by_hand(self):
        token = torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0], requires_grad=True)
        order, offsets = torch.tensor([0, 2, 1, 3, 4]), torch.tensor([0, 2, 2, 5])
        sums = response_logps(token, order, offsets)
        assert sums.tolist() == [-5.0, 0.0, -26.0]  # the middle response has no target here
        assert sums.dtype == torch.float64
        (torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64) * sums).sum().backward()
        assert token.grad.tolist() == [1.0, 100.0, 1.0, 100.0, 100.0]
        assert token.grad.dtype == torch.float32

    def test_sums_are_float64(self):
        """In float32 the small terms would vanish beside the large one."""
        token = torch.full((1001,), -1e-5)
        token[0] = -1e4
        sums = response_logps(token, torch.arange(1001), torch.tensor([0, 1001]))
        assert sums.item() == pytest.approx(-1e4 - 1e-2, abs=1e-8)

    def test_no_responses(self):
        token = torch.zeros(0, requires_grad=True)
        sums = response_logps(token, torch.zeros(0, dtype=torch.long), torch.tensor([0]))
        assert sums.shape == (0,) and sums.dtype == torch.float64
        sums.sum().backward()
        assert token.grad.shape == (0,)


def scales_by_gradient(logits, rows, targets, num_layers):
    """By autograd, one target after another."""
    scales = []
    for row, target in zip(rows.tolist(), targets.tolist(), strict=True):
        own = logits.detach()[row, :VOCAB].clone().requires_grad_()
        (slope,) = torch.autograd.grad(log_softmax(own, -1)[target], own)
        squares = own.detach().square()
        scales.append((slope.square() * (squares + num_layers * squares.mean())).sum().sqrt())
    return torch.stack(scales)


def _half_of_the_vocabulary(rank, store, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    rows, targets = some_targets(5)
    half = draw(5, PADDED).chunk(2, dim=1)[rank].clone().requires_grad_()
    logps = vocab_parallel_logps(half, rows, targets, VOCAB, dist.group.WORLD)
    collisions = vocab_parallel_collisions(half, VOCAB, dist.group.WORLD)
    (draw(len(rows), seed=1) * logps).sum().backward()
    scales = vocab_parallel_scales(half, rows, targets, VOCAB, 3, dist.group.WORLD)
    torch.save((logps.detach(), half.grad, collisions, scales), f"{results}.{rank}")
    dist.destroy_process_group()


def test_split_over_two_ranks_it_is_the_same(tmp_path):
    results = tmp_path / "result"
    mp.spawn(_half_of_the_vocabulary, (str(tmp_path / "store"), str(results)), nprocs=2)
    logits = draw(5, PADDED).requires_grad_()
    rows, targets = some_targets(5)
    expected = expected_logps(logits, rows, targets)
    (draw(len(rows), seed=1) * expected).sum().backward()
    halves = [torch.load(f"{results}.{rank}") for rank in (0, 1)]
    squares = logits.detach()[:, :VOCAB].softmax(-1).square().sum(-1)
    for logps, _, collisions, scales in halves:
        expected_scales = scales_by_gradient(logits, rows, targets, 3)
        assert torch.allclose(scales, expected_scales, rtol=1e-12, atol=0)
        assert torch.allclose(logps, expected, rtol=0, atol=1e-13)
        assert torch.allclose(collisions, squares.log(), rtol=0, atol=1e-13)
    together = torch.cat([half[1] for half in halves], dim=1)
    assert torch.allclose(together, logits.grad, rtol=0, atol=1e-13)


@pytest.mark.parametrize("chunk_size", [2, 100])
def test_collisions_are_those_of_the_whole_vocabulary(chunk_size):
    """log of the sum of squared probabilities, of 10 tokens padded to 12, without gradient."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 12, generator=generator, dtype=torch.float64).requires_grad_()
    logit, target = torch.tensor([0, 1, 1, 3, 4]), torch.tensor([9, 0, 3, 3, 7])
    options = {"vocab_size": 10, "chunk_size": chunk_size}
    plain = token_logps(hidden, lambda x: x, logit, target, **options)
    result = token_logps(hidden, lambda x: x, logit, target, **options, with_collisions=True)
    assert torch.equal(result[0], plain)
    expected = hidden.detach()[:, :10].softmax(-1).square().sum(-1).log()[logit]
    assert torch.allclose(result[1], expected, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(result.sum(), hidden)
    assert torch.equal(gradient, torch.autograd.grad(plain.sum(), hidden)[0])


@pytest.mark.parametrize("chunk_size", [2, 100])
def test_scales_are_those_of_the_whole_vocabulary(chunk_size):
    """Of 10 tokens padded to 12; log-probabilities and their gradients are the same."""
    hidden = draw(5, 12).requires_grad_()
    hidden.data[:, 10:] = 1e6  # padding
    logit, target = torch.tensor([0, 1, 1, 3, 4]), torch.tensor([9, 0, 3, 3, 7])
    options = {"vocab_size": 10, "chunk_size": chunk_size}
    plain = token_logps(hidden, lambda x: x, logit, target, **options)
    result = token_logps(
        hidden, lambda x: x, logit, target, **options, with_collisions=True, scale_layers=7
    )
    assert torch.equal(result[0], plain)
    expected = scales_by_gradient(hidden[:, :10], logit, target, 7)
    assert torch.allclose(result[2], expected, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(result.sum(), hidden)
    assert torch.equal(gradient, torch.autograd.grad(plain.sum(), hidden)[0])
