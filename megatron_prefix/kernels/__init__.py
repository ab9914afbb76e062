"""Triton kernels: one launch in place of several, for CUDA, with switches in the model section.

What a kernel computes is defined by elementary operations of torch beside its caller. The tests
compare both in Triton's interpreter, on CPU, and compile every kernel for compute capability 9.0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_prefix.faces import lazy_face

if TYPE_CHECKING:
    from megatron_prefix.kernels.launching import why_no_kernels
    from megatron_prefix.kernels.rotary import rotated
    from megatron_prefix.kernels.segments import segment_sums
    from megatron_prefix.kernels.softmax import row_statistics, softmax_gradient
    from megatron_prefix.kernels.swiglu import gated, gated_gradient
else:
    __getattr__ = lazy_face(
        __name__,
        launching=["why_no_kernels"],
        rotary=["rotated"],
        segments=["segment_sums"],
        softmax=["row_statistics", "softmax_gradient"],
        swiglu=["gated", "gated_gradient"],
    )

__all__ = [
    "gated",
    "gated_gradient",
    "rotated",
    "row_statistics",
    "segment_sums",
    "softmax_gradient",
    "why_no_kernels",
]
