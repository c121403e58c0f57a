"""Calls in threads: handed over one by one, or a function over many items with its results in their order."""

from __future__ import annotations

import collections
import concurrent.futures
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

POLL_SECONDS = 0.2  # between two calls of `waiting`
AHEAD = 4  # items in work or waiting to be yielded, for each that may run at once


class DaemonThreads:
    """Threads that make calls first come, first served.

    Not a ThreadPoolExecutor: that one joins its threads when Python exits, and a call that stands still would keep the
    process.
    """

    def __init__(self, count: int, name: str):
        self._calls: queue.SimpleQueue[tuple[concurrent.futures.Future, Callable, tuple] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True) for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[..., Result], *arguments: Any) -> concurrent.futures.Future[Result]:
        """Hands over a call."""
        future: concurrent.futures.Future[Result] = concurrent.futures.Future()
        self._calls.put((future, function, arguments))
        return future

    def close(self, wait: bool = False) -> None:
        """Ends the threads once the calls handed over so far have returned, those cancelled left out."""
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads if wait else ():
            thread.join()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            future, function, arguments = call
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = function(*arguments)
            except BaseException as error:  # noqa: B036 - handed over to the thread that waits
                future.set_exception(error)
            else:
                future.set_result(result)


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
    threads = DaemonThreads(concurrency, "ordered")
    pending: collections.deque[tuple[Item, concurrent.futures.Future[Result]]] = collections.deque()
    finished = False
    try:
        for item in items:
            pending.append((item, threads.submit(function, item)))
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
        for _, future in pending:
            future.cancel()
        threads.close(wait=True)


def _result(future: concurrent.futures.Future[Result], waiting: Callable[[], None]) -> Result:
    while not concurrent.futures.wait([future], timeout=POLL_SECONDS).done:
        waiting()
    return future.result()
