"""Work on a thread beside the main one, which failure detection can name if it stalls."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator


class SideWork(threading.Thread):
    """A thread that does `action` and ends with the process; `work` names it in messages."""

    def __init__(self, work: str, action: Callable[[], None]) -> None:
        super().__init__(target=action, name=work, daemon=True)
        self._begin = time.monotonic()
        self._is_awaited = False

    @contextlib.contextmanager
    def awaited(self) -> Iterator[None]:
        """Context in which the main thread does nothing but wait for this work."""
        self._is_awaited = True
        try:
            yield
        finally:
            self._is_awaited = False

    @property
    def is_awaited(self) -> bool:
        """Whether the main thread waits for this work, which has not ended."""
        return self._is_awaited and self.is_alive()

    @property
    def described(self) -> str:
        """The work and its age: "the background write of checkpoint 4, since 75 s"."""
        return f"{self.name}, since {time.monotonic() - self._begin:.0f} s"


def side_works() -> list[SideWork]:
    """Those of this process that have not ended."""
    return [thread for thread in threading.enumerate() if isinstance(thread, SideWork)]
