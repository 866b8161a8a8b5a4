"""Independent pieces of work on the cores of this machine."""

import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from typing import Any

import torch

from harness.runs.terminal import quiet_lightning
from harness.system import keep_freed_memory

Tick = Callable[[], None]
Work = Callable[..., Any]
POLL = 0.5  # seconds
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

_ticks: "SimpleQueue[int]"


class Pool:
    """Processes with one thread each, started at the first use and kept until `close`.

    There are as many as torch may use threads: work of thousands of small operations is bound by
    Python, which threads do not share. With one thread, with one call, or where there is a GPU,
    work runs in this process.
    """

    def __init__(self) -> None:
        self._executor: ProcessPoolExecutor | None = None

    def run(self, work: Work, calls: Iterable[tuple[Any, ...]], tick: Tick) -> list[Any]:
        """Return ``work(*call, tick=tick)`` of each call; after a failure none is begun.

        Args:
            work: An importable function, or a partial or bound method of importable ones.
            calls: Arguments, in the order of starting.
            tick: Called whenever the work calls the function that it is given as ``tick``.

        Raises:
            Exception: The first that a call raised, when the calls under way have ended.
        """
        calls = list(calls)
        if min(torch.get_num_threads(), len(calls)) <= 1 or torch.cuda.is_available():
            return [work(*call, tick=tick) for call in calls]
        executor, count = self._started(), torch.get_num_threads()
        results: list[Any] = [None] * len(calls)
        waiting, failure = list(enumerate(calls))[::-1], None
        running: dict[Future[Any], int] = {}
        while running or (waiting and failure is None):
            while waiting and len(running) < count and failure is None:
                index, call = waiting.pop()
                running[executor.submit(_run, work, call)] = index
            for future in self._finished(running, tick):
                index, error = running.pop(future), future.exception()
                failure = failure or error
                results[index] = None if error else future.result()
        if failure is not None:
            raise failure
        return results

    def close(self) -> None:
        """End the processes."""
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)
            self._executor = None

    def _started(self) -> ProcessPoolExecutor:
        if self._executor is None:
            context = get_context("spawn")
            self._queue: SimpleQueue[int] = context.SimpleQueue()
            self._executor = ProcessPoolExecutor(
                torch.get_num_threads(),
                mp_context=context,
                initializer=_start,
                initargs=(self._queue, os.getpid()),
            )
        return self._executor

    def _finished(self, running: Iterable[Future[Any]], tick: Tick) -> set[Future[Any]]:
        """Pass ticks on, and return what has ended within a moment."""
        done, _ = wait(running, timeout=POLL, return_when=FIRST_COMPLETED)
        while not self._queue.empty():
            for _ in range(self._queue.get()):
                tick()
        return done


def _start(ticks: "SimpleQueue[int]", parent: int) -> None:
    global _ticks
    _ticks = ticks
    keep_freed_memory()
    quiet_lightning()
    torch.set_num_threads(1)
    os.environ |= dict.fromkeys(THREADS, "1")  # for what loads later: SciPy's BLAS spins otherwise
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent: int) -> None:
    """End this process when its parent is gone, even if it was killed."""
    while os.getppid() == parent:
        time.sleep(POLL)
    os._exit(1)


def _run(work: Work, call: tuple[Any, ...]) -> Any:
    return work(*call, tick=lambda: _ticks.put(1))


def in_processes(work: Work, arguments: Iterable[tuple[Any, ...]], tick: Tick) -> list[Any]:
    """Return ``work(*one, tick=tick)`` of each of ``arguments``, see `Pool.run`."""
    pool = Pool()
    try:
        return pool.run(work, arguments, tick)
    finally:
        pool.close()
