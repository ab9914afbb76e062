"""Every Triton kernel of ours compiles for an H100 and fits it."""

from __future__ import annotations

import importlib.util

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton: pip install triton"
)
DTYPES = "bf16", "fp16", "fp32"
BOUNDARIES = {"order_ptr": "*i64", "offsets_ptr": "*i64"}


def kernels() -> list:
    """Kernel, types of its arguments (`x` is that of the model) and constants."""
    rotary = {x: "*x" for x in ("x_ptr", "cos_ptr", "sin_ptr", "out_ptr")}
    rotary |= {x: "i32" for x in ("stride_token", "stride_head", "num_heads", "head_dim")}
    rotary |= {"pairs": "i32", "sign": "i32"}
    sums = BOUNDARIES | {"copies_ptr": "*x", "out_ptr": "*x", "stride": "i32", "channels": "i32"}
    gate = {"x_ptr": "*x", "out_ptr": "*x", "channels": "i32"}
    head = {"x_ptr": "*x", "top_ptr": "*fp32", "sum_ptr": "*fp32", "stride": "i32"}
    head |= {"columns": "i32"}
    gradient = head | {"weight_ptr": "*fp32", "grad_ptr": "*fp32", "out_ptr": "*x", "width": "i32"}
    gradient |= {"offsets_ptr": "*i64", "target_ptr": "*i64"}
    return [
        ("rotary.rotary_kernel", rotary, {"INTERLEAVED": False, "PAIRS": 64, "REST": 0}),
        ("rotary.rotary_kernel", rotary, {"INTERLEAVED": True, "PAIRS": 128, "REST": 0}),
        ("rotary.rotary_kernel", rotary, {"INTERLEAVED": False, "PAIRS": 32, "REST": 128}),
        ("segments.segments_kernel", sums, {}),
        ("swiglu.gate_kernel", gate, {}),
        ("swiglu.gate_gradient_kernel", gate | {"grad_ptr": "*x"}, {}),
        ("softmax.statistics_kernel", head, {"num_warps": 8}),
        ("softmax.gradient_kernel", gradient, {"num_warps": 8}),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_compile_for_an_h100_and_fit(dtype):
    from compiled import compile_kernel

    every = {}
    for name, types, constants in kernels():
        module_name, _, kernel_name = name.partition(".")
        module = importlib.import_module(f"megatron_prefix.kernels.{module_name}")
        kernel = getattr(module, kernel_name)
        own = {
            x: getattr(module, x) for x in ("HEADS", "CHANNELS", "COLUMNS") if hasattr(module, x)
        }
        signature = {
            key: kind.replace("x", dtype) if kind == "*x" else kind for key, kind in types.items()
        }
        every[name, str(constants)] = compile_kernel(kernel, signature, **own, **constants)
    assert {name: x.faults() for name, x in every.items() if x.faults()} == {}


def test_a_kernel_over_the_limit_of_shared_memory_is_detected():
    import triton
    import triton.language as tl
    from compiled import MOST_SHARED, compile_kernel

    @triton.jit
    def product_kernel(x_ptr, y_ptr, out_ptr, steps, BLOCK: tl.constexpr):
        rows, columns = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
        total = tl.zeros([BLOCK, BLOCK], tl.float32)
        for step in range(steps):
            x = tl.load(x_ptr + rows * 8192 + step * BLOCK + columns)
            y = tl.load(y_ptr + (step * BLOCK + rows) * 8192 + columns)
            total += tl.dot(x, y)
        tl.store(out_ptr + rows * BLOCK + columns, total)

    signature = {"x_ptr": "*bf16", "y_ptr": "*bf16", "out_ptr": "*fp32", "steps": "i32"}
    options = {"num_warps": 8, "num_stages": 5}
    large = compile_kernel(product_kernel, signature, BLOCK=128, **options)
    assert large.shared > MOST_SHARED and "of shared memory" in large.faults()[0]
    small = compile_kernel(product_kernel, signature, BLOCK=64, **options)
    assert small.faults() == []
