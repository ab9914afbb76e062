"""Stop a run from outside: after SIGTERM or SIGINT it finishes the current step, then ends."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

import torch

from megatron_prefix.distributed.liveness import SignalHandler
from megatron_prefix.distributed.world import World

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Context in which SIGTERM or SIGINT on any rank asks all ranks to stop. A second signal has
    its usual effect at once."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._received: int | None = None
        self._previous: dict[int, SignalHandler] = {}

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        signal.signal(number, self._previous[number])

    def is_asked(self) -> bool:
        """Whether any rank has received a signal. Collective: all ranks get the same answer."""
        flag = torch.tensor([float(self._received is not None)], device=self._world.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag.item())
