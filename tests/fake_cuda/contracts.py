"""What torch's flash operators demand of a call beyond their signatures; their meta kernels do not
check it.

Two boundaries of the same dtype and length may change places without an error of shapes. So the
plan's arrays stay with their tensors (`remember`), and the values that a boundary must have are
known: the last one is the number of tokens.

Shapes: T tokens, N query heads, G key/value heads, H head dim.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

FORWARD = (
    "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask".split()
)
BACKWARD = (
    "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k dropout_p".split()
)
BACKWARD += ["is_causal", "rng_state", "unused"]
CALLS = {"_flash_attention_forward": FORWARD, "_flash_attention_backward": BACKWARD}
KNOWN = "values_on_the_host"


def remember(on_device: Any) -> Any:
    """`on_device` whose results keep the array that they were made from."""

    def remembered(array: np.ndarray, device: Any) -> torch.Tensor:
        tensor = on_device(array, device)
        setattr(tensor, KNOWN, np.array(array))
        return tensor

    return remembered


def check_call(name: str, args: tuple, kwargs: dict) -> None:
    """Raise AssertionError, naming what is wrong, if a call of a flash operator breaks its
    contract; other operators pass."""
    if name not in CALLS:
        return
    call = dict(zip(CALLS[name], args, strict=True)) | kwargs
    q, k, v = (call[x] for x in ("query", "key", "value"))
    tensors = {x: call[x] for x in ("query", "key", "value")}
    if name.endswith("backward"):
        tensors |= {"grad_out": call["grad_out"], "out": call["out"]}
        assert call["grad_out"].shape == call["out"].shape == q.shape, "grad_out, out, query differ"
        assert call["logsumexp"].shape == (q.size(1), q.size(0)), "logsumexp is not [N, T]"
        assert call["logsumexp"].dtype == torch.float32, "logsumexp is not float32"
    for key, tensor in tensors.items():
        assert tensor.dim() == 3, f"{key} is not [T, heads, H]"
        assert tensor.dtype == q.dtype, f"{key} is {tensor.dtype}, query {q.dtype}"
        assert tensor.dtype in (torch.bfloat16, torch.float16), f"{key} is {tensor.dtype}"
        assert tensor.stride(-1) == 1, f"the last dimension of {key} is not contiguous"
    assert k.shape == v.shape and k.size(2) == q.size(2), "shapes of query, key and value"
    assert q.size(1) % k.size(1) == 0, "query heads are no multiple of key heads: order?"
    assert call["dropout_p"] == 0.0 and isinstance(call["is_causal"], bool)
    for side, tensor in (("q", q), ("k", k)):
        check_boundaries(side, call[f"cum_seq_{side}"], call[f"max_{side}"], tensor.size(0))


def check_boundaries(side: str, boundaries: torch.Tensor, longest: int, num_tokens: int) -> None:
    """Raise AssertionError unless boundaries of the plan fit the tokens of queries or keys."""
    assert boundaries.dtype == torch.int32, f"boundaries of {side} are {boundaries.dtype}"
    known = getattr(boundaries, KNOWN, None)
    assert known is not None, f"boundaries of {side} are not the plan's"
    assert known[-1] == num_tokens, (
        f"boundaries of {side} end at {known[-1]}, and there are {num_tokens} tokens: order?"
    )
    least = max(int(np.diff(known).max(initial=0)), 2 if side == "q" else 1)
    assert longest == least, f"the bound of {side} is {longest}, and the longest piece {least}"


def check_launch(kernel: Any, args: tuple, constants: dict) -> None:
    """Raise AssertionError if a Triton kernel gets other arguments than it has: tensors for
    pointers only, all on the device and with a contiguous last dimension."""
    call = dict(zip(kernel.arg_names, args, strict=False)) | constants
    given = set(call) - {"num_warps", "num_stages"}
    assert given == set(kernel.arg_names), f"arguments of {kernel.fn.__name__}: order?"
    for name, value in call.items():
        is_tensor = isinstance(value, torch.Tensor)
        assert is_tensor == name.endswith("_ptr"), f"{name} is {type(value).__name__}: order?"
        if is_tensor:
            assert value.is_cuda, f"{name} is on {value.device}, not on the same device"
            assert value.stride(-1) == 1, f"the last dimension of {name} is not contiguous"
            is_index = name.startswith(("order", "offsets", "target"))
            assert is_index != value.is_floating_point(), f"{name} is {value.dtype}: order?"
