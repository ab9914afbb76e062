"""Set-up and tear-down shared by train, score and evaluate: process groups and kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

from megatron_prefix.attention.backends import flash_version, resolve_flash_version
from megatron_prefix.config import Config
from megatron_prefix.distributed.user_buffers import UserBuffers
from megatron_prefix.distributed.world import World, join_world
from megatron_prefix.errors import InputError


@contextlib.contextmanager
def open_session(config: Config) -> Iterator[World]:
    """Join the run's processes and choose the FlashAttention version that `config` names.

    The version holds for the whole process: only here does a run replace the kernel that torch's
    attention operators call. The end of the context restores it. Raises InputError.
    """
    model, version = config.model, 2
    with join_world(config.parallel, config.train.seed) as world:
        if model.attention_backend in ("auto", "flash"):
            try:
                version = resolve_flash_version(model.flash_version, world.device)
            except ValueError as error:
                raise InputError(f"model.{error}") from None
        buffers = UserBuffers.of_run(config)
        with flash_version(version), contextlib.ExitStack() as stack:
            if buffers is not None:
                stack.callback(buffers.close)
            yield replace(world, buffers=buffers)
