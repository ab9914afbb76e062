"""What every command that runs a model stands in: its process groups and its kernels.

This is the one place where a run puts another FlashAttention behind torch's operators, which is
the whole process's business; it is taken away again at the run's end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from megatron_prefix.attention.backends import flash_version, resolve_flash_version
from megatron_prefix.config.schema import Config
from megatron_prefix.distributed.world import World, world
from megatron_prefix.errors import InputError


@contextlib.contextmanager
def running(config: Config) -> Iterator[World]:
    """Join the run's processes, with the FlashAttention that `config` names behind torch's
    operators, for as long as the context. Raises InputError where either cannot be."""
    model, version = config.model, 2
    with world(config.parallel, config.train.seed) as here:
        if model.attention_backend in ("auto", "flash"):
            try:
                version = resolve_flash_version(model.flash_version, here.device)
            except ValueError as error:
                raise InputError(f"model.{error}") from None
        with flash_version(version):
            yield here
