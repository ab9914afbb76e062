"""Which FlashAttention stands behind torch's flash operators during a run.

torch's own is FlashAttention-2. It can put FlashAttention-3 or -4 behind the same operators where
they are installed, for the whole process. A run does so in one place, when it joins its process
group, and undoes it at its end:

    with flash_version(3):
        ...                      # `aten::_flash_attention_forward` is FlashAttention-3's
                                 # and here again whatever it was before

`auto` is 3 on Hopper where that is installed, else 2; 4 is only ever used by name.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import NamedTuple

import torch


class _Implementation(NamedTuple):
    name: str
    """What torch calls it."""
    module: str
    """What torch imports for it."""
    majors: tuple[int, ...]
    """Compute capabilities it has kernels for, the first number."""
    remedy: str


IMPLEMENTATIONS = {
    3: _Implementation(
        "FA3",
        "flash_attn_interface",
        (9,),
        "install FlashAttention-3 (the directory hopper/ of Dao-AILab/flash-attention)",
    ),
    4: _Implementation("FA4", "flash_attn.cute.interface", (9, 10), "`pip install flash-attn-4`"),
}
NEEDED = tuple(f"{x}_flash_attention_impl" for x in ("activate", "current", "restore"))


def why_not_version(version: int, device: torch.device | str) -> str | None:
    """What keeps FlashAttention `version` from serving torch's operators, with the remedy."""
    if version == 2:
        return None
    wanted, device = IMPLEMENTATIONS[version], torch.device(device)
    if missing := [name for name in NEEDED if not hasattr(torch.nn.attention, name)]:
        return (
            f"torch {torch.__version__} lacks torch.nn.attention.{missing[0]}; install torch "
            "2.11 or newer, or use flash_version 2"
        )
    if not _is_installed(wanted.module):
        return f"{wanted.module} is not installed: {wanted.remedy}, or use flash_version 2"
    if device.type != "cuda" or not torch.cuda.is_available():
        return f"it runs on CUDA, not on {device.type}; use flash_version auto"
    major, minor = torch.cuda.get_device_capability(device)
    if major not in wanted.majors:
        return (
            f"it has kernels for compute capability {' and '.join(map(str, wanted.majors))}, "
            f"this device has {major}.{minor}; use flash_version 2"
        )
    return None


def resolve_flash_version(version: int | str, device: torch.device | str) -> int:
    """The version that `version` (auto, 2, 3 or 4) stands for on `device`: 2, 3 or 4.

    Raises ValueError, with the remedy, where a version given by number cannot serve.
    """
    if version == "auto":
        return 3 if why_not_version(3, device) is None else 2
    if version not in (2, *IMPLEMENTATIONS):
        raise ValueError(f"flash_version {version!r} is unknown; use one of auto, 2, 3, 4")
    if obstacle := why_not_version(version, device):
        raise ValueError(f"flash_version {version} cannot be used: {obstacle}")
    return version


def active_version() -> int:
    """The FlashAttention that is behind torch's operators now: 2, 3 or 4."""
    if not hasattr(torch.nn.attention, NEEDED[1]):
        return 2
    name = torch.nn.attention.current_flash_attention_impl()
    return {None: 2, **{x.name: version for version, x in IMPLEMENTATIONS.items()}}[name]


@contextlib.contextmanager
def flash_version(version: int) -> Iterator[None]:
    """Have FlashAttention `version` behind torch's operators inside, and what was there after.

    `version` comes from `resolve_flash_version`. Process-wide; nests.
    """
    torch_attention = torch.nn.attention
    if not hasattr(torch_attention, NEEDED[1]):  # such a torch has FlashAttention-2 only
        assert version == 2
        yield
        return
    before = torch_attention.current_flash_attention_impl()
    _put(None if version == 2 else IMPLEMENTATIONS[version].name)
    try:
        yield
    finally:
        _put(before)


def _put(name: str | None) -> None:
    """Make `name` the active implementation; None is torch's own."""
    if name == torch.nn.attention.current_flash_attention_impl():
        return
    if name is None:
        torch.nn.attention.restore_flash_attention_impl()
    else:
        torch.nn.attention.activate_flash_attention_impl(name)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a package above it is missing
        return False
