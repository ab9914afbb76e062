"""Every adaptation for CPU changes something that the installed Megatron-Core still does."""

from __future__ import annotations

import ast
from importlib.metadata import version
from pathlib import Path

import megatron.core
import pytest
import torch

from megatron_prefix.platform import adapted, device

CORE = Path(megatron.core.__file__).parent
INSTALLED = tuple(map(int, version("megatron-core").split(".")[:2]))

PLACES = [
    # file, function, what it contains, first version
    ("pipeline_parallel/schedules.py", "forward_backward_no_pipelining", 'device="cuda"'),
    (
        "pipeline_parallel/schedules.py",
        "forward_backward_pipelining_with_interleaving",
        'device="cuda"',
    ),
    (
        "pipeline_parallel/schedules.py",
        "forward_backward_pipelining_without_interleaving",
        'device="cuda"',
    ),
    ("optimizer/optimizer.py", "FP32Optimizer.__init__", "device='cuda'"),
    ("optimizer/optimizer.py", "MixedPrecisionOptimizer.__init__", "device='cuda'"),
    ("optimizer/clip_grads.py", "get_grad_norm_fp32", "device='cuda'"),
    ("optimizer/distrib_optimizer.py", "DistributedOptimizer.get_parameter_state_dp_zero", ".cuda"),
    ("optimizer/clip_grads.py", "clip_grad_by_total_norm_fp32", "'torch.cuda.FloatTensor'"),
    (
        "optimizer/optimizer.py",
        "Float16OptimizerWithFloat16Params.__init__",
        "'torch.cuda.BFloat16Tensor'",
    ),
    (
        "models/common/embeddings/rotary_pos_embedding.py",
        "RotaryEmbedding.__init__",
        "torch.cuda.current_device()",
    ),
    ("tensor_parallel/mappings.py", "_reduce_scatter_along_first_dim", "current_device()"),
    ("pipeline_parallel/p2p_communication.py", "P2PCommunicator._communicate", "cuda.synchronize"),
    ("tensor_parallel/random.py", "_get_cuda_rng_state", "torch.cuda.random.get_rng_state("),
    ("tensor_parallel/random.py", "CudaRNGStatesTracker.add", "torch.cuda.get_rng_state()"),
    (
        "distributed/param_and_grad_buffer.py",
        "_ParamAndGradBucketGroup.start_grad_sync",
        "torch.cuda.current_stream()",
        (0, 19),
    ),
    (
        "transformer/moe/token_dispatcher.py",
        "MoEAlltoAllTokenDispatcher.__init__",
        "cuda_dtoh_stream = torch.cuda.Stream()",
    ),
    (
        "transformer/moe/token_dispatcher.py",
        "MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize",
        "self.cuda_dtoh_stream",
    ),
    ("tensor_parallel/mappings.py", "_gather_along_first_dim", "dist_all_gather_func("),
]


def source_of(file: str, name: str) -> str:
    """The source of a function or method, without its docstring."""
    text = (CORE / file).read_text(encoding="utf-8")
    node: ast.AST = ast.parse(text)
    for part in name.split("."):
        node = next(
            child
            for child in node.body
            if isinstance(child, ast.FunctionDef | ast.ClassDef) and child.name == part
        )
    body = node.body[1:] if ast.get_docstring(node) else node.body
    return "\n".join(ast.get_source_segment(text, statement) or "" for statement in body)


@pytest.mark.sample
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place[1])
def test_the_place_is_where_the_table_says(place):
    file, name, text, *since = place
    if since and INSTALLED < since[0]:
        assert text not in source_of(file, name), "the table's first version is too high"
    else:
        assert text in source_of(file, name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="adapts a machine without CUDA")
def test_contexts_may_be_nested():
    with adapted(), adapted():
        assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
        assert torch.zeros(1, device="cuda").device == device()
    assert torch.zeros(1).type() == "torch.FloatTensor"
