"""Backends of tree attention, one file each, and what they share.

A backend's module has one record, `BACKEND`, and is imported by `load_backend` when it is used.
`dense.py` is the specification. `regather.py` keeps gathered keys from being saved for backward;
`flash_versions.py` selects the FlashAttention that torch's operators call.
"""

from megatron_prefix.attention.backends.backend import BACKENDS, Scoring, load_backend
from megatron_prefix.attention.backends.flash_versions import flash_version, resolve_flash_version
from megatron_prefix.attention.backends.regather import KeyGather, KeysAndValues, attend_gathered

__all__ = [
    "BACKENDS",
    "KeyGather",
    "KeysAndValues",
    "Scoring",
    "attend_gathered",
    "flash_version",
    "load_backend",
    "resolve_flash_version",
]
