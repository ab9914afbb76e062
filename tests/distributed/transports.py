"""What test_transports.py runs on several processes: each transport against the whole row."""

import json

import numpy as np
import torch
import torch.distributed as dist

from megatron_prefix.attention import tree_attention
from megatron_prefix.attention.context_parallel import ContextCost, ContextParallel
from megatron_prefix.layout import TreeLayout
from megatron_prefix.testing import BytesSent, random_forest, random_heads

# Attention alone: every swap that evens the area out is worth its keys.
COST = ContextCost(per_token=0.0, per_entry=1.0, per_key=0.1)
HEADS, GROUPS, DIM = 12, 6, 8


def compare(
    comm: str, backend: str, seed: int, window: int | None = None, softcap: float | None = None
) -> dict:
    """Largest difference of output and gradients from attention over the whole row; with a window
    also with sinks."""
    rng, size = np.random.default_rng(seed), dist.get_world_size()
    layout = random_forest(rng, num_trees=int(rng.integers(1, 6)))
    missing = -layout.num_tokens % size
    if missing:
        layout = TreeLayout.concat([layout, TreeLayout.from_parents([missing], [-1])])
    q, k, v, grad = random_heads(layout.num_tokens, HEADS, GROUPS, DIM, seed)
    sinks = torch.arange(float(HEADS), dtype=q.dtype).sin().requires_grad_() if window else None
    settings = {"window": window, "softcap": softcap}
    expected = tree_attention(q, k, v, layout, backend="dense", sinks=sinks, **settings)
    expected.backward(grad)

    context = ContextParallel(dist.group.WORLD, comm, COST)
    share = context.share(layout, torch.device("cpu"))
    own = torch.from_numpy(share.tokens)
    parts = [x.detach()[own].requires_grad_() for x in (q, k, v)]
    with BytesSent(dist.group.WORLD) as sent:
        own_sinks = None if sinks is None else sinks.detach().requires_grad_()
        output = share.attend(*parts, backend, None, sinks=own_sinks, **settings)
        output.backward(grad[own])
    pairs = [
        (output, expected[own]),
        *((a.grad, b.grad[own]) for a, b in zip(parts, (q, k, v), strict=True)),
    ]
    if sinks is not None:  # a parameter on every rank, whose gradients are summed
        dist.all_reduce(own_sinks.grad)
        pairs.append((own_sinks.grad, sinks.grad))
    transport = share.windowed(window).transport
    count = torch.tensor(float(len(own)), requires_grad=True)
    total = share.sum(count)
    total.backward()
    return {
        "error": max(float((a - b).detach().abs().max()) for a, b in pairs),
        "sent": sent.total,
        "predicted": transport.bytes_sent(HEADS, GROUPS, DIM, q.element_size()),
        "is_contiguous": bool((np.diff(share.tokens) == 1).all()),
        "tokens": [float(total), layout.num_tokens, float(count.grad)],
    }


def main(cases: list[dict], output: str) -> None:
    """Every rank's comparisons, written to `output` as JSON."""
    dist.init_process_group("gloo")
    compared = [{**case, **compare(**case), "rank": dist.get_rank()} for case in cases]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, compared)
    if dist.get_rank() == 0:
        with open(output, "w") as file:
            json.dump([x for part in everyone for x in part], file)
    dist.barrier()  # nobody takes its connections down while another still uses them
    dist.destroy_process_group()
