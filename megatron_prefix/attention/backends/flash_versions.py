"""The version of FlashAttention that torch's flash operators call during a run.

torch contains FlashAttention-2. If FlashAttention-3 or -4 is installed, torch can make the same
operators call it, in the whole process. A run selects the version in one place, when it joins its
process group, and restores the previous one at its end:

    with flash_version(3):
        ...                      # `aten::_flash_attention_forward` calls FlashAttention-3
    ...                          # and here the previous version again

`auto` is 3 on Hopper if version 3 is installed, else 2. Version 4 is used only if named.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import NamedTuple

import torch

from megatron_prefix.attention.backends.arity import returned_values, unpacked_values


class _Implementation(NamedTuple):
    name: str
    """torch's name of it."""
    module: str
    """The module that torch imports for it."""
    majors: tuple[int, ...]
    """Major compute capabilities for which it has kernels."""
    remedy: str
    unpacks: tuple[str, str] | None = None
    """The module of torch that unpacks what a function of `module` returns, and that function."""


IMPLEMENTATIONS = {
    3: _Implementation(
        "FA3",
        "flash_attn_interface",
        (9,),
        "install FlashAttention-3 (the directory hopper/ of Dao-AILab/flash-attention)",
    ),
    4: _Implementation(
        "FA4",
        "flash_attn.cute.interface",
        (9, 10),
        "`pip install 'flash-attn-4<=4.0.0b17'`",
        ("torch.nn.attention._fa4", "_flash_attn_fwd"),
    ),
}
VERSIONS = {implementation.name: version for version, implementation in IMPLEMENTATIONS.items()}
NEEDED = tuple(f"{x}_flash_attention_impl" for x in ("activate", "current", "restore"))


def why_not_version(version: int, device: torch.device | str) -> str | None:
    """Why torch's operators cannot call FlashAttention `version`, with the remedy; else None."""
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
    if wanted.unpacks is not None and (fault := _arity_fault(wanted, *wanted.unpacks)):
        return fault
    if device.type != "cuda" or not torch.cuda.is_available():
        return f"it runs on CUDA, not on {device.type}; use flash_version auto"
    major, minor = torch.cuda.get_device_capability(device)
    if major not in wanted.majors:
        return (
            f"it has kernels for compute capability {' and '.join(map(str, wanted.majors))}, but "
            f"this device has {major}.{minor}; use flash_version 2"
        )
    return None


def resolve_flash_version(version: int | str, device: torch.device | str) -> int:
    """The version that `version` (auto, 2, 3 or 4) means on `device`: 2, 3 or 4.

    Raises ValueError, with the remedy, if a version given by number cannot be used.
    """
    if version == "auto":
        return 3 if why_not_version(3, device) is None else 2
    if version not in (2, *IMPLEMENTATIONS):
        raise ValueError(f"flash_version {version!r} is unknown; use one of auto, 2, 3, 4")
    if obstacle := why_not_version(version, device):
        raise ValueError(f"flash_version {version} cannot be used: {obstacle}")
    return int(version)


def active_version() -> int:
    """The version of FlashAttention that torch's operators call now: 2, 3 or 4."""
    if not hasattr(torch.nn.attention, NEEDED[1]):
        return 2
    name = torch.nn.attention.current_flash_attention_impl()
    return 2 if name is None else VERSIONS[name]


@contextlib.contextmanager
def flash_version(version: int) -> Iterator[None]:
    """Make torch's operators call FlashAttention `version` inside the context.

    `version` comes from `resolve_flash_version`. Holds for the whole process; may be nested.
    """
    torch_attention = torch.nn.attention
    if not hasattr(torch_attention, NEEDED[1]):  # this version of torch has only FlashAttention-2
        assert version == 2
        yield
        return
    before = torch_attention.current_flash_attention_impl()
    _activate(None if version == 2 else IMPLEMENTATIONS[version].name)
    try:
        yield
    finally:
        _activate(before)


def _activate(name: str | None) -> None:
    """Make `name` the active implementation; None is torch's FlashAttention-2."""
    if name == torch.nn.attention.current_flash_attention_impl():
        return
    if name is None:
        torch.nn.attention.restore_flash_attention_impl()
    else:
        torch.nn.attention.activate_flash_attention_impl(name)


def _arity_fault(wanted: _Implementation, caller: str, function: str) -> str | None:
    """Why torch cannot unpack what the installed version returns, with the remedy; else None."""
    returned, unpacked = returned_values(wanted.module, function), unpacked_values(caller, function)
    if returned is None or unpacked is None or returned == unpacked:
        return None
    return (
        f"{function} of the installed {wanted.module} returns {returned} values, and torch "
        f"{torch.__version__} takes {unpacked}: {wanted.remedy}, or use flash_version 2"
    )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False
