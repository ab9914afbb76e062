"""One function applied to many items by several processes, with results in order.

    items 0 1 2 3 4 5, two workers: this process does item 0; then the workers get 1 and 2, and up
    to AHEAD * 2 items are in the queue, finished or not; results are returned as 0, 1, 2, …

So memory does not grow with the number of items. On Linux, processes are forked: they start at
once and share what the parent has loaded.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

from megatron_prefix.errors import RunError
from megatron_prefix.platform import end_with_parent

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 3
"""Items in the queue per worker."""
TOKENIZER_THREADS = "TOKENIZERS_PARALLELISM"

_function: Callable[[Any], Any] | None = None
"""In a worker: the function that it applies to every item."""


def ordered(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Generator[tuple[Item, Result]]:
    """Every item with the result of `function`, in order.

    An exception of `function` is raised after the results of all items before it, whatever the
    number of workers. Raises RunError if a worker dies. Closing the generator ends the workers.
    """
    items = iter(items)
    # With several workers the first item is done here: processes that are forked after it share
    # what it has loaded.
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
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    try:
        # The oldest result is taken as soon as the queue is full, so that its length is bounded
        # and results come in order; a slow item only delays those after it.
        for item in items:
            waiting.append((item, pool.submit(_work, item)))
            if len(waiting) >= AHEAD * workers:
                yield _next(waiting)
        while waiting:
            yield _next(waiting)
    except BrokenProcessPool as error:
        raise RunError(
            "a worker process ended before its work was done (it was killed, or there was no "
            "memory left): free some memory, or give fewer --workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _next(waiting: deque[tuple[Item, Future[Result]]]) -> tuple[Item, Result]:
    item, future = waiting.popleft()
    return item, future.result()


def _start_worker(function: Callable[[Any], Any]) -> None:
    """Set up a worker: it ignores interrupts (the parent handles them) and ends with the parent.

    Freezing the garbage collector keeps the memory shared with the parent from being copied.
    """
    global _function
    _function = function
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def _work(item: Any) -> Any:
    assert _function is not None
    return _function(item)


@contextmanager
def single_threaded_tokenizers() -> Iterator[None]:
    """No threads in Hugging Face tokenizers, unless the user's environment sets it otherwise.

    A process must not fork after it has used their threads.
    """
    if TOKENIZER_THREADS in os.environ:
        yield
        return
    os.environ[TOKENIZER_THREADS] = "false"
    try:
        yield
    finally:
        os.environ.pop(TOKENIZER_THREADS, None)
