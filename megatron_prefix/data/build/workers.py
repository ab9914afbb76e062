"""A function over items in several processes, results in the order of the items.

The first item is done here, before any process is started; then a bounded number of items is on
its way at a time, so that memory does not grow with their number. Processes are forked where that
is sound (Linux): they start at once and share what the parent has loaded.
"""

from __future__ import annotations

import gc
import multiprocessing
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, TypeVar

from megatron_prefix.errors import RunError
from megatron_prefix.platform.linux import end_with_parent

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 3
"""Items on their way a worker."""

_function: Callable[[Any], Any] | None = None
"""In a worker: what it does to every item."""


def ordered(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[tuple[Item, Result]]:
    """Every item with what `function` makes of it, in order.

    What `function` raises for an item comes after the results of all items before it, whatever
    the number of workers. Raises RunError where a worker dies. Closing the iterator ends the
    workers.
    """
    items = iter(items)
    for item in islice(items, 1 if workers > 1 else None):
        yield item, function(item)
    if workers > 1:
        yield from _in_processes(function, items, workers)


def _in_processes(
    function: Callable[[Item], Result], items: Iterator[Item], workers: int
) -> Iterator[tuple[Item, Result]]:
    method = "fork" if sys.platform == "linux" else "spawn"
    context = multiprocessing.get_context(method)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (function,))
    waiting: deque = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(_work, item)))
            if len(waiting) >= AHEAD * workers:
                yield _next(waiting)
        while waiting:
            yield _next(waiting)
    except BrokenProcessPool as error:
        raise RunError(
            "a worker process ended before its work was done (killed, or out of memory): free "
            "some memory, or give fewer --workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _next(waiting: deque) -> tuple[Any, Any]:
    item, future = waiting.popleft()
    return item, future.result()


def _start_worker(function: Callable[[Any], Any]) -> None:
    """A worker leaves interrupts to its parent, ends when that does, and never searches for
    garbage in what it shares with it."""
    global _function
    _function = function
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def _work(item: Any) -> Any:
    assert _function is not None
    return _function(item)
