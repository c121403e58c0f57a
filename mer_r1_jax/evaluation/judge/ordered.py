"""A function over many items with bounded concurrency, results in the items' order."""

from __future__ import annotations

import collections
import concurrent.futures
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

POLL_SECONDS = 0.2  # between two calls of `waiting`
AHEAD = 4  # items in work or waiting to be yielded, for each that may run at once


def map_ordered(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    concurrency: int,
    on_stop: Callable[[], None] = lambda: None,
    waiting: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Item, Result]]:
    """Yields (item, function(item)) in order, while later items are already worked on in threads.

    Args:
        function: called from several threads; what it raises ends the iteration.
        items: taken a few at a time, so that a long list of large ones need not be in memory.
        concurrency: calls at once.
        on_stop: called when the iteration ends before its items, so that calls that wait can give up.
        waiting: called again and again while a result is waited for; what it raises ends the iteration.
    """
    pool = concurrent.futures.ThreadPoolExecutor(concurrency, thread_name_prefix="judge")
    pending: collections.deque[tuple[Item, concurrent.futures.Future[Result]]] = collections.deque()
    finished = False
    try:
        for item in items:
            pending.append((item, pool.submit(function, item)))
            if len(pending) >= AHEAD * concurrency:
                done, future = pending.popleft()
                yield done, _result(future, waiting)
        while pending:
            done, future = pending.popleft()
            yield done, _result(future, waiting)
        finished = True
    finally:
        if not finished:
            on_stop()
        pool.shutdown(wait=True, cancel_futures=True)


def _result(future: concurrent.futures.Future[Result], waiting: Callable[[], None]) -> Result:
    while not concurrent.futures.wait([future], timeout=POLL_SECONDS).done:
        waiting()
    return future.result()
