"""Processes of a run: joining them, stopping them by a signal, noticing that one has failed; the
output directories that belong to them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_prefix.faces import lazy_face

if TYPE_CHECKING:
    from megatron_prefix.distributed.liveness import ends_at_once
    from megatron_prefix.distributed.ownership import owned
    from megatron_prefix.distributed.session import open_session
    from megatron_prefix.distributed.signals import StopRequest
    from megatron_prefix.distributed.user_buffers import check_row
    from megatron_prefix.distributed.world import World, join_world
    from megatron_prefix.distributed.world_size import world_faults
else:
    __getattr__ = lazy_face(
        __name__,
        liveness=["ends_at_once"],
        ownership=["owned"],
        session=["open_session"],
        signals=["StopRequest"],
        user_buffers=["check_row"],
        world=["World", "join_world"],
        world_size=["world_faults"],
    )

__all__ = [
    "StopRequest",
    "World",
    "check_row",
    "ends_at_once",
    "join_world",
    "open_session",
    "owned",
    "world_faults",
]
