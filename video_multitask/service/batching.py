"""Dynamic batching: requests that arrive together are scored together, by one thread."""

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np

from video_multitask.service.contract import Arrays, Limits, RefusedError, Scorer


class Pending(NamedTuple):
    """A request that waits for its batch.

    Attributes:
        scorer: Model that was in service when the request arrived.
        request: What the model has read.
        arrived: Seconds of the monotonic clock.
        future: Gets the results of its rows.
    """

    scorer: Scorer[Any]
    request: Any
    arrived: float
    future: "Future[Arrays]"


class Batcher:
    """Collect requests for a few milliseconds and score them at once, in the order of arrival.

    While a batch is scored the next one gathers, so that batches grow with the load. A batch that
    fails is scored again one by one: a request cannot make others fail.

    Args:
        limits: Of the service.
        observe: Called with requests and rows of each batch.
    """

    def __init__(
        self, limits: Limits, observe: Callable[[int, int], None] = lambda _requests, _rows: None
    ) -> None:
        self.limits, self.observe = limits, observe
        self._waiting: deque[Pending] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="scoring", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """Return the number of requests that wait."""
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        """Whether requests are scored."""
        return self._thread.is_alive() and not self._closed

    def require_room(self) -> None:
        """Refuse a request if too many wait.

        Raises:
            RefusedError: 429.
        """
        if len(self) >= self.limits.max_queue:
            raise RefusedError(f"{len(self)} requests are waiting, the limit: try again", 429)

    def submit(self, scorer: Scorer[Any], request: Any) -> "Future[Arrays]":
        """Queue a request and return the future results of its rows.

        Raises:
            RefusedError: 429, too many requests wait; 503, the service is shutting down.
        """
        future: Future[Arrays] = Future()
        with self._changed:
            if self._closed:
                raise RefusedError("the service is shutting down: ask another instance", 503)
            self.require_room()
            self._waiting.append(Pending(scorer, request, time.monotonic(), future))
            if len(self._waiting) == 1 or self._full():  # else the thread wakes up in time
                self._changed.notify()
        return future

    def close(self, timeout: float = 30.0) -> None:
        """Score what waits, then end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout)

    def _work(self) -> None:
        while batch := self._gather():
            running = [p for p in batch if p.future.set_running_or_notify_cancel()]
            if running:
                self.observe(len(running), sum(len(p.request) for p in running))
                self._score(running)

    def _gather(self) -> list[Pending]:
        """Return the next batch; an empty one when the service is closed and nothing waits."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            if not self._waiting:
                return []
            end = self._waiting[0].arrived + self.limits.max_wait_ms / 1000
            while not self._closed and not self._full():
                left = end - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    break
            return [self._waiting.popleft() for _ in range(self._fitting())]

    def _full(self) -> bool:
        """Return whether the next batch cannot grow any more."""
        count = self._fitting()
        return count < len(self._waiting) or count >= self.limits.max_batch_requests

    def _fitting(self) -> int:
        """Return how many of the requests that wait go into the next batch, at least one."""
        rows, scorer = 0, self._waiting[0].scorer
        for count, pending in enumerate(self._waiting):
            rows += len(pending.request)
            other = pending.scorer is not scorer or count >= self.limits.max_batch_requests
            if count and (other or rows > self.limits.max_batch_rows):
                return count
        return len(self._waiting)

    def _score(self, batch: list[Pending]) -> None:
        try:
            parts = scored(batch[0].scorer, [p.request for p in batch])
        except Exception as error:
            if len(batch) == 1:
                batch[0].future.set_exception(error)
            else:
                for pending in batch:
                    self._score([pending])
            return
        for pending, part in zip(batch, parts, strict=True):
            pending.future.set_result(part)


def scored(scorer: Scorer[Any], requests: list[Any]) -> list[Arrays]:
    """Score requests at once and return the results of each.

    Raises:
        ValueError: The model returned another number of rows.
    """
    found = scorer.score(requests)
    ends = np.cumsum([len(request) for request in requests])
    if wrong := [name for name, array in found.items() if len(array) != ends[-1]]:
        raise ValueError(f"the model returned {len(found[wrong[0]])} rows for {ends[-1]}")
    starts = [0, *ends[:-1]]
    return [
        {name: array[start:end] for name, array in found.items()}
        for start, end in zip(starts, ends, strict=True)
    ]
