"""Code for one machine: Megatron-Core on CPU, copies to the device, threads, the Linux kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_prefix.faces import lazy_face

if TYPE_CHECKING:
    from megatron_prefix.platform.linux import end_with_parent
    from megatron_prefix.platform.megatron_cpu import adapted, device
    from megatron_prefix.platform.side_work import SideWork, side_works
    from megatron_prefix.platform.transfer import on_device
    from megatron_prefix.platform.versions import gradients_for_norm, submodules_of
else:
    __getattr__ = lazy_face(
        __name__,
        linux=["end_with_parent"],
        megatron_cpu=["adapted", "device"],
        side_work=["SideWork", "side_works"],
        transfer=["on_device"],
        versions=["gradients_for_norm", "submodules_of"],
    )

__all__ = [
    "SideWork",
    "adapted",
    "device",
    "end_with_parent",
    "gradients_for_norm",
    "on_device",
    "side_works",
    "submodules_of",
]
