"""What this machine needs: Megatron-Core on CPU, copies to a device, Linux's own calls."""

from megatron_prefix.platform.linux import end_with_parent
from megatron_prefix.platform.megatron_cpu import adapted, device
from megatron_prefix.platform.transfer import on_device

__all__ = ["adapted", "device", "end_with_parent", "on_device"]
