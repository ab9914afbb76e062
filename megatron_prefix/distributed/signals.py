"""Stop a run from outside: after a signal it finishes the current step, then ends.

The signals are SIGTERM, SIGINT, SIGHUP (a closed terminal) and SIGUSR1 (Slurm, before its limit).
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

import torch

from megatron_prefix.distributed.liveness import SignalHandler
from megatron_prefix.distributed.world import World

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class StopRequest:
    """Context in which one of SIGNALS on any rank asks all ranks to stop.

    A second SIGTERM, or SIGINT after any signal, ends this process at once. SIGHUP and SIGUSR1
    never do: a closed terminal sends SIGHUP twice. SIGHUP stays ignored if it was (nohup).
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._received: int | None = None
        self._previous: dict[int, SignalHandler] = {}

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
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
        if number == signal.SIGTERM:
            signal.signal(number, self._previous[number])
        # Python's own handler of SIGINT waits until code in C returns; the kernel does not.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def is_asked(self) -> bool:
        """Whether any rank has received a signal. Collective: all ranks get the same answer."""
        flag = torch.tensor([float(self._received is not None)], device=self._world.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag.item())
