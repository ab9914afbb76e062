"""What the processes of a run do together while they read or write a checkpoint.

`group` has all processes and communicates on the host. None is the default group; a save in the
background has a group of its own, because the training loop uses the default one at that time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist

Group = dist.ProcessGroup | None


def is_main() -> bool:
    """Whether this process writes what only one writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def own_share(names: list[str]) -> list[str]:
    """The names that this process works on: every n-th of n processes."""
    return names[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else names


def gathered(own: object, group: Group = None) -> list:
    """`own` of every process, in the order of ranks. Collective."""
    if not dist.is_initialized():
        return [own]
    parts: list = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own, group=group)
    return parts


def on_main(action: Callable[[], None], group: Group = None) -> None:
    """Run `action` on the main process. Its OSError or RuntimeError is raised on every process.
    Collective."""
    outcome: list[Exception | None] = [None]
    if is_main():
        try:
            action()
        except (OSError, RuntimeError) as error:
            outcome[0] = error
    if dist.is_initialized():
        dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[0] is not None:
        raise outcome[0]
