"""The model in service: requests scored together, and its replacement while they are answered."""

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core_gates.errors import GatesError
from harness.system import return_freed_memory
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
    arrays = scorer.score(requests)
    ends = np.cumsum([len(request) for request in requests])
    if wrong := [name for name, array in arrays.items() if len(array) != ends[-1]]:
        raise ValueError(f"the model returned {len(arrays[wrong[0]])} rows for {ends[-1]}")
    starts = [0, *ends[:-1]]
    return [
        {name: array[start:end] for name, array in arrays.items()}
        for start, end in zip(starts, ends, strict=True)
    ]


LOG = logging.getLogger("gates.service")
Loader = Callable[[Path], Scorer[Any]]


def find_model(place: Path) -> Path:
    """Return the folder of a model: ``place`` itself, or what a manifest names.

    Args:
        place: A folder, a symbolic link to one, or a JSON file ``{"folder": "NAME"}``, relative to
            the folder of that file.

    Raises:
        GatesError: There is no such folder, or the manifest names none.
    """
    folder = place
    if place.suffix == ".json" and place.is_file():
        try:
            content = json.loads(place.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise GatesError(f"{place} cannot be read as JSON: {error}") from error
        name = content.get("folder") if isinstance(content, dict) else None
        if not isinstance(name, str) or not name:
            raise GatesError(f'{place} names no model: expected {{"folder": "NAME"}}')
        folder = place.parent / name
    if not folder.is_dir():
        raise GatesError(f"{folder} is not a folder of a model: check the path")
    return folder.resolve()


def stamp(folder: Path) -> tuple[Any, ...]:
    """Return what changes when a folder or its content is replaced."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    states = [(str(path), path.stat()) for path in files]
    return str(folder), tuple((p, s.st_ino, s.st_size, s.st_mtime_ns) for p, s in states)


class Models:
    """The model in service.

    A thread looks at the folder (see `find_model`). Another folder, or a changed one, that is
    the same at two looks is loaded next to the model in service, warmed up and put in its place by
    one assignment; requests that the old one has read are finished by it. A folder that cannot be
    loaded, or whose model has another interface, so that clients would fail, is refused once,
    logged, and the model in service stays.

    Args:
        place: Folder, link or manifest.
        load: Loads a folder.
        notify: Called with ``swapped`` or ``refused`` for each new folder.
        poll_s: Seconds between two looks.

    Attributes:
        current: Model in service.

    Raises:
        GatesError: The first model cannot be loaded.
    """

    def __init__(
        self,
        place: Path,
        load: Loader,
        notify: Callable[[str], None] = lambda _outcome: None,
        poll_s: float = 1.0,
    ) -> None:
        self.place, self.load, self.notify, self.poll_s = place, load, notify, poll_s
        folder = find_model(place)
        self._seen = self._settled = stamp(folder)
        self.current = self._loaded(folder)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watching", daemon=True)

    def start(self) -> None:
        """Start the thread that watches for a newer model."""
        self._thread.start()

    def close(self) -> None:
        """Stop watching for a newer model."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(30)

    def look(self) -> bool:
        """Look once, and return whether another model came into service."""
        try:
            folder = find_model(self.place)
            current_stamp = stamp(folder)
        except (GatesError, OSError) as error:
            current_stamp = (str(error),)
            if current_stamp not in (self._seen, self._settled):
                LOG.warning("%s; %s stays in service", error, self.current.version)
            self._seen = current_stamp
            return False
        stable, self._seen = current_stamp == self._seen, current_stamp
        if not stable or current_stamp == self._settled:
            return False
        self._settled = current_stamp
        return self._swap(folder)

    def _swap(self, folder: Path) -> bool:
        old = self.current.version
        try:
            loaded = self._loaded(folder)
            _refuse_other(loaded.interface, self.current.interface)
            self.current = loaded
        except Exception as error:
            line = " ".join(str(error).split()) or type(error).__name__
            LOG.error("%s is refused: %s; %s stays in service", folder, line, old)
            self.notify("refused")
            return False
        LOG.info("%s is in service instead of %s", self.current.version, old)
        self.notify("swapped")
        return True

    def _loaded(self, folder: Path) -> Scorer[Any]:
        scorer = self.load(folder)
        scorer.warm_up()
        return scorer

    def _watch(self) -> None:
        while not self._stopping.wait(self.poll_s):
            try:
                if self.look():
                    self._stopping.wait(self.poll_s)  # the old model finishes its requests
                    return_freed_memory()
            except Exception:
                LOG.exception("watching %s", self.place)


def _refuse_other(new: Mapping[str, str], old: Mapping[str, str]) -> None:
    """Refuse a model that requests for the old one do not fit."""
    changes = [
        *(f"lacks {name}" for name in old if name not in new),
        *(f"has in addition {name}, {new[name]}" for name in new if name not in old),
        *(f"has {n}, {new[n]} instead of {old[n]}" for n in new if old.get(n, new[n]) != new[n]),
    ]
    if changes:
        raise GatesError(
            f"it {'; it '.join(changes[:3])}{' …' if changes[3:] else ''}: clients would fail; "
            "start a separate service for it"
        )
