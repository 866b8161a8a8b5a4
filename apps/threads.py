"""Independent pieces of work on the cores of this machine."""

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from threading import Event

import torch

Tick = Callable[[], None]


class _Stopped(Exception):  # noqa: N818
    """Another piece of work failed."""


def in_threads(jobs: Sequence[Callable[[Tick], None]], tick: Tick) -> None:
    """Run jobs on as many threads as torch may use, each of them with one thread of torch.

    Work of many small operations gains little from the threads within an operation, and nearly all
    of them from this. The first exception stops all jobs at their next tick and is raised.

    Args:
        jobs: What to do, in the order of starting; each is given a function that it calls often.
        tick: Called whenever a job calls its function.
    """
    count, stop = torch.get_num_threads(), Event()

    def tick_or_stop() -> None:
        if stop.is_set():
            raise _Stopped
        tick()

    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(count) as pool:
            try:
                futures = [pool.submit(job, tick_or_stop) for job in jobs]
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
            finally:
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
    finally:
        torch.set_num_threads(count)
