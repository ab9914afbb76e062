"""Transformer Engine's buffers of overlapped communication, without values: shapes and sizes."""

from __future__ import annotations

import math
from typing import Any

import torch

MADE: list[CommOverlap] = []
"""The buffers of the run, in their order."""
USED: list[str] = []
"""What was done with them: `fill`, `read`."""


class CommOverlap:
    """One buffer, of the size of a row."""

    def __init__(
        self, shape: list[int], dtype: torch.dtype, helper: Any, ranks: int, *_: Any, **__: Any
    ) -> None:
        self.shape, self.dtype, self.ranks = tuple(shape), dtype, ranks
        MADE.append(self)

    def with_cublasmp(self) -> bool:
        return False

    def is_fp8_ubuf(self) -> bool:
        return self.dtype is torch.uint8

    def is_atomic_gemm(self) -> bool:
        return False

    def copy_into_buffer(self, x: torch.Tensor, local_chunk: bool = False) -> None:
        """Of a rank's part, or of all of a row."""
        whole = x.numel() * (self.ranks if local_chunk else 1)
        assert whole == math.prod(self.shape), f"{tuple(x.shape)} in a buffer of {self.shape}"
        assert x.dtype is self.dtype, f"{x.dtype} in a buffer of {self.dtype}"
        USED.append("fill")

    def get_buffer(self, local_chunk: bool = False, shape: list[int] | None = None) -> torch.Tensor:
        rows, columns = self.shape
        own = (rows // self.ranks if local_chunk else rows, columns)
        own = own if shape is None else tuple(shape)
        whole = math.prod(own) * (self.ranks if local_chunk else 1)
        assert whole == math.prod(self.shape), f"{own} of a buffer of {self.shape}"
        USED.append("read")
        return torch.empty(own, dtype=self.dtype, device="cuda")


class CommOverlapP2P(CommOverlap):
    """A buffer that ranks pass on in a ring."""


def ubuf_built_with_mpi() -> bool:
    return False


def device_supports_multicast() -> bool:
    return True


def get_stream_priority_range() -> tuple[int, int]:
    return 0, -5


OVERLAP = (
    CommOverlap,
    CommOverlapP2P,
    ubuf_built_with_mpi,
    device_supports_multicast,
    get_stream_priority_range,
)
