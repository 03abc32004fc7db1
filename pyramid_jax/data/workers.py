# SPDX-License-Identifier: Apache-2.0
"""Processes, or threads, that make examples for the one that trains, in any order."""

import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

Message = list[Any]  # examples, and what could not be made
MakeMessage = Callable[[range], Message]


class Workers:
    """Processes that make messages, for all rows of a host; 0 makes them in this one.

    They leave signals to this process, and end when it does, however that is.

    Args:
        threads: they are threads of this process, which may use its devices.
    """

    def __init__(self, make: MakeMessage, count: int, threads: bool = False):
        self._make, self._count, self._threads = make, count, threads
        self._pool: Executor | None = None

    def order(self, numbers: range) -> Callable[[], Message]:
        """A function that returns the message of some examples once it is made."""
        if not self._count:
            return functools.partial(self._make, numbers)
        if self._pool is None:
            self._pool = self._started()
        work = self._make if self._threads else _work
        return self._pool.submit(work, numbers).result

    def close(self) -> None:
        """Ends the processes; the next order starts new ones."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pool = None

    def _started(self) -> Executor:
        if self._threads:
            return ThreadPoolExecutor(self._count)
        return ProcessPoolExecutor(
            self._count,
            multiprocessing.get_context("spawn"),
            initializer=_begin_work,
            initargs=(self._make,),
        )


_making: list[MakeMessage] = []  # in a worker, what it was started for


def _begin_work(make: MakeMessage) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    _making.append(make)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)  # the pipes to a process that was killed stay open


def _work(numbers: range) -> Message:
    return _making[0](numbers)
