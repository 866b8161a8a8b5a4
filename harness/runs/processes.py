"""Independent pieces of work on the cores of this machine."""

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from typing import Any, TypeVar

import torch

from harness.runs.memory import keep_freed_memory
from harness.runs.quiet import quiet_lightning

Result = TypeVar("Result")
Tick = Callable[[], None]
POLL = 0.5  # seconds

_work: Callable[..., Any]
_ticks: "SimpleQueue[int]"


def in_processes(
    work: Callable[..., Result], arguments: Sequence[tuple[Any, ...]], tick: Tick
) -> list[Result]:
    """Return ``work(*one, tick=tick)`` for each of ``arguments``.

    As many processes as torch may use threads share them, each with one thread: work of thousands
    of small operations is bound by Python, which threads do not share. With one thread, or for one
    piece of work, everything runs here.

    Args:
        work: What to do, such as a bound method; it is sent to every process once.
        arguments: Of each piece of work, in the order of starting.
        tick: Called whenever a piece of work calls the function that it is given as ``tick``.
    """
    count = min(torch.get_num_threads(), len(arguments))
    if count <= 1:
        return [work(*one, tick=tick) for one in arguments]
    context = get_context("spawn")
    queue = context.SimpleQueue()
    with ProcessPoolExecutor(
        count, mp_context=context, initializer=_start, initargs=(work, queue, os.getpid())
    ) as pool:
        futures = [pool.submit(_run, one) for one in arguments]
        try:
            _watch(futures, queue, tick)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return [future.result() for future in futures]


def _watch(futures: list[Future[Any]], queue: "SimpleQueue[int]", tick: Tick) -> None:
    """Pass ticks on until all is done; raise the first exception."""
    pending = set(futures)
    while pending:
        done, pending = wait(pending, timeout=POLL, return_when=FIRST_EXCEPTION)
        while not queue.empty():
            for _ in range(queue.get()):
                tick()
        for future in done:
            future.result()


def _start(work: Callable[..., Any], ticks: "SimpleQueue[int]", parent: int) -> None:
    global _work, _ticks
    _work, _ticks = work, ticks
    keep_freed_memory()
    quiet_lightning()
    torch.set_num_threads(1)
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent: int) -> None:
    """End this process when its parent is gone, even if it was killed."""
    while os.getppid() == parent:
        time.sleep(POLL)
    os._exit(1)


def _run(one: tuple[Any, ...]) -> Any:
    return _work(*one, tick=lambda: _ticks.put(1))
