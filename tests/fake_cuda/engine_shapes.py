"""Results of Transformer Engine's C++ without values: shapes, dtypes, and what the calls demand."""

from __future__ import annotations

import math
from typing import Any

import torch
from contracts import check_boundaries

Tensor = torch.Tensor


def rmsnorm_fwd(x: Tensor, weight: Tensor, eps: float, out: Any, *rest: Any) -> tuple:
    """Normed rows, no mean, and 1 / root mean square of each row."""
    assert x.dim() == 2 and weight.shape == x.shape[1:] and x.is_contiguous(), "norm's input"
    quantizer = rest[0] if rest else None
    return _result(x, out, quantizer), None, x.new_empty(len(x), dtype=torch.float32)


def layernorm_fwd(x: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> tuple:
    mean = x.new_empty(len(x), dtype=torch.float32)
    normed, _, deviation = rmsnorm_fwd(x, weight, *rest)
    return normed, mean, deviation


def rmsnorm_bwd(grad: Tensor, x: Tensor, deviation: Tensor, weight: Tensor, *rest: Any) -> tuple:
    assert grad.shape == x.shape and deviation.shape == x.shape[:1], "norm's gradient"
    return torch.empty_like(x), torch.empty_like(weight)


def rmsnorm_bwd_add(grad: Tensor, x: Tensor, added: Tensor, *rest: Any) -> tuple:
    assert added.shape == x.shape, "the gradient that is added"
    return rmsnorm_bwd(grad, x, *rest)


def layernorm_bwd(grad: Tensor, x: Tensor, mean: Tensor, *rest: Any) -> tuple:
    dx, d_weight = rmsnorm_bwd(grad, x, *rest)
    return dx, d_weight, torch.empty_like(d_weight)


def generic_gemm(
    a: Tensor,
    transposes_a: bool,
    b: Tensor,
    transposes_b: bool,
    out: Tensor | None,
    quantizer: Any,
    out_dtype: Any,
    bias: Tensor | None,
    *rest: Any,
    **options: Any,
) -> tuple:
    """op(b) op(a) of matrices in torch's order: [M, K] times [N, K] transposed is [M, N]."""
    a2, b2 = ((math.prod(x.shape[:-1]), x.shape[-1]) for x in (a, b))
    rows, inner = b2[::-1] if transposes_b else b2
    columns, other = a2 if transposes_a else a2[::-1]
    assert inner == other, f"a product of {tuple(b.shape)} and {tuple(a.shape)}: order?"
    assert a.device.type == b.device.type == "cuda"
    is_fp8 = [hasattr(x, "_quantizer") for x in (a, b)]
    assert is_fp8[0] == is_fp8[1], "one operand is in FP8"
    if is_fp8[0]:
        assert inner % 16 == rows % 8 == columns % 16 == 0, f"{rows} x {inner} x {columns} in FP8"
    else:
        assert a.dtype == b.dtype, f"{a.dtype} and {b.dtype}"
    shape = (rows, columns) if transposes_b else (*b.shape[:-1], columns)
    if out is not None:
        assert out.shape == shape, f"{tuple(out.shape)}, not {tuple(shape)}"
        result = out
    else:
        dtype = _torch_dtype(out_dtype, getattr(a, "dtype", torch.bfloat16))
        result = torch.empty(shape, dtype=dtype, device="cuda")
    is_gradient = rest[3] if len(rest) > 3 else False
    bias_gradient = result.new_empty(columns) if bias is not None and is_gradient else None
    scattered = options.get("extra_output")  # each rank's part of a sum over ranks
    if scattered is not None and scattered.numel():
        assert scattered.shape[-1] == columns and rows % scattered.shape[0] == 0, "scattered sums"
    return result, bias_gradient, None, scattered


def multi_tensor_l2norm(
    size: int, overflow: Tensor, lists: list[list[Tensor]], per_tensor: bool = False
) -> tuple[Tensor, Tensor]:
    assert all(x.is_cuda for x in lists[0])
    number = len(lists[0]) if per_tensor else 0
    return overflow.new_empty(1, dtype=torch.float32), overflow.new_empty(number).float()


def get_cudnn_version() -> int:
    return 92_000


def get_fused_attn_backend(call: Any) -> tuple[int, str]:
    """cuDNN's kernel for rows of any length."""
    from transformer_engine.pytorch.cpp_extensions.fused_attn import FusedAttnBackend

    return int(FusedAttnBackend["F16_arbitrary_seqlen"]), ""


def fused_attn_fwd(
    longest_q: int, longest_kv: int, trains: bool, scale: float, dropout: float, *rest: Any
) -> list[Tensor]:
    window, is_bottom_right, *tensors = rest[7:]
    boundaries_q, boundaries_kv, q, k, v = tensors[:5]
    _check_attention(window, is_bottom_right, q, k, v)
    check_boundaries("q", boundaries_q, longest_q, q.size(0))
    check_boundaries("k", boundaries_kv, longest_kv, k.size(0))
    statistics = q.new_empty(*q.shape[:2], 1, dtype=torch.float32)
    return [torch.empty_like(q), statistics, q.new_empty(2, dtype=torch.int64)]


def fused_attn_bwd(
    longest_q: int, longest_kv: int, scale: float, dropout: float, *rest: Any
) -> list[Tensor]:
    window, is_bottom_right, _, *tensors = rest[10:]
    boundaries_q, boundaries_kv, q, k, v, out, grad = tensors[:7]
    _check_attention(window, is_bottom_right, q, k, v)
    check_boundaries("q", boundaries_q, longest_q, q.size(0))
    check_boundaries("k", boundaries_kv, longest_kv, k.size(0))
    assert out.shape == grad.shape == q.shape, "output and its gradient"
    return [torch.empty_like(x) for x in (q, k, v)]


def _check_attention(window: Any, is_bottom_right: Any, *tensors: Tensor) -> None:
    q, k, v = tensors
    assert window[1] in (0, -1) and is_bottom_right is True, f"window {window}: order?"
    assert k.shape == v.shape and q.size(1) % k.size(1) == 0 and q.size(2) == k.size(2)
    for name, x in zip("qkv", tensors, strict=True):
        assert x.stride(-1) == 1, f"the last dimension of {name} is not contiguous"
        assert x.dtype is torch.bfloat16, f"{name} is {x.dtype}"


def get_num_cublas_streams() -> int:
    return 4


def quantize(x: Tensor, quantizer: Any, out: Any = None, *rest: Any) -> Any:
    """`x` in FP8: no values, the quantizer's kind of tensor."""
    assert x.is_cuda and x.shape[-1] % 16 == 0, f"{tuple(x.shape)} in FP8"
    return _result(x, out, quantizer)


def dequantize(x: Any, dtype: Any) -> Tensor:
    return torch.empty(x.size(), dtype=_torch_dtype(dtype, torch.bfloat16), device="cuda")


def create_empty_quantized_tensor(
    quantizer: Any, shape: list[int], dtype: torch.dtype, device: torch.device, *rest: Any
) -> Any:
    """A tensor of the quantizer's kind."""
    from transformer_engine.pytorch.tensor import float8_tensor as module

    kind = type(quantizer)
    if kind is module.Float8Quantizer:  # the same tensors; its own description is in the C++
        kind = module.Float8CurrentScalingQuantizer
    meta = kind.storage_metadata(quantizer, dtype)
    described = {"is_tensor": not quantizer.internal, "requires_grad": False, **meta}
    parts = {
        name: torch.empty(size, dtype=own, device=device)
        for name, (size, own) in kind.inner_tensor_specs(quantizer, tuple(shape)).items()
    }
    strides = torch.empty(shape, device="meta").stride()
    return described["cls"].__tensor_unflatten__(parts, described, torch.Size(shape), strides)


def _result(x: Tensor, out: Any, quantizer: Any = None) -> Any:
    if out is not None:
        return out
    if quantizer is None:
        return torch.empty_like(x)
    return quantizer.make_empty(x.shape, dtype=x.dtype, device=x.device)


def _torch_dtype(kind: Any, default: torch.dtype) -> torch.dtype:
    names = {"kFloat32": torch.float32, "kBFloat16": torch.bfloat16, "kFloat16": torch.float16}
    return default if kind is None else names[kind.name]


FUNCTIONS = (
    rmsnorm_fwd,
    layernorm_fwd,
    quantize,
    dequantize,
    create_empty_quantized_tensor,
    rmsnorm_bwd,
    layernorm_bwd,
    rmsnorm_bwd_add,
    generic_gemm,
    multi_tensor_l2norm,
    get_cudnn_version,
    get_fused_attn_backend,
    fused_attn_fwd,
    fused_attn_bwd,
    get_num_cublas_streams,
)
