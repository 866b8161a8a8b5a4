"""The service over HTTP: requests read within limits, ``/score``, health, metrics, and its end."""

import asyncio
import json
import logging
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import quote

import numpy as np
import uvicorn
from fastapi import FastAPI, Request, Response
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    generate_latest,
)
from pydantic_core import from_json, to_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from core_gates.errors import GatesError
from video_multitask.service.contract import Limits, RefusedError
from video_multitask.service.serving_model import Batcher, Loader, Models

CONTAINERS = 64  # lists and mappings for each row that a request may have
FEWEST = 2**17  # lists and mappings that are taken in any case; a million would stall all others
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
REQUESTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
ROWS = (1, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
LOG = logging.getLogger("gates.service")
LARGE = 2**18  # bytes of a body that is parsed by another thread, so that others are answered


async def read_body(request: Request, limits: Limits) -> bytes:
    """Return the body of a request.

    One that is refused is read to its end, and dropped, so that a client sees the refusal.

    Raises:
        RefusedError: 413, longer than the limit; 408, did not arrive in time; 400, the client left;
            415, it is compressed.
    """
    parts = _Parts(request, limits.max_body_bytes)
    try:
        async with asyncio.timeout(limits.timeout_s):
            async for part in request.stream():
                parts.add(part)
    except TimeoutError as error:
        parts.refuse_long()
        raise RefusedError(f"the body did not arrive within {limits.timeout_s:g} s", 408) from error
    except ClientDisconnect as error:
        raise RefusedError("the client has left", 400) from error
    parts.refuse_long()
    coding = request.headers.get("content-encoding", "").strip().lower()
    if coding not in ("", "identity"):
        raise RefusedError(
            f"the body has the content-encoding {coding[:20]!r}: send it as plain JSON", 415
        )
    return b"".join(parts.kept)


class _Parts:
    """What has arrived of a body, dropped once it is too long."""

    def __init__(self, request: Request, most: int) -> None:
        announced = request.headers.get("content-length", "")
        self.size = int(announced) if announced.isdigit() else 0
        self.most, self.read, self.kept = most, 0, list[bytes]()

    def add(self, part: bytes) -> None:
        self.read += len(part)
        if max(self.size, self.read) <= self.most:
            self.kept.append(part)
        else:
            self.kept.clear()

    def refuse_long(self) -> None:
        if (length := max(self.size, self.read)) > self.most:
            raise RefusedError(
                f"the body has {length:,} bytes or more, at most {self.most:,} are taken: send "
                "fewer rows at a time",
                413,
            )


def parse(body: bytes, max_rows: int) -> Any:
    """Parse strict JSON: UTF-8, no NaN, no infinity, no name twice in a mapping.

    Args:
        body: Of a request.
        max_rows: Rows that a request may have; they bound how many lists and mappings are built,
            before any is, since Python tracks each of them.

    Raises:
        RefusedError: 400, with line and column; 413, too many lists and mappings; 422, a name is
            given twice.
    """
    brackets, most = body.count(b"[") + body.count(b"{"), max(FEWEST, CONTAINERS * max_rows)
    if brackets > most:
        raise RefusedError(
            f"the body has {brackets:,} lists and mappings, at most {most:,} are taken: send fewer "
            "rows at a time",
            413,
        )
    try:
        content = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise RefusedError(f"the body is no JSON: {error}", 400) from error
    if body.count(b":") != _count_names(content):  # a name twice, a colon in text, or deep nesting
        json.loads(body, object_pairs_hook=_distinct, parse_int=_nothing, parse_float=_nothing)
    return content


def _count_names(content: Any) -> int:
    """Return the number of names in a mapping, its mappings and lists of mappings."""
    if type(content) is not dict:
        return 0
    count = len(content)
    for value in content.values():
        if type(value) is dict:
            count += len(value)
        elif type(value) is list:
            count += sum(len(row) for row in value if type(row) is dict)
    return count


def _distinct(pairs: list[tuple[str, Any]]) -> None:
    """Refuse a mapping that has a name twice."""
    names = {name for name, _ in pairs}
    for name, _ in pairs if len(names) < len(pairs) else ():
        if name not in names:
            raise RefusedError(f"the name {name[:40]!r} is given twice in one mapping: keep one")
        names.remove(name)


def _nothing(_: str) -> None:
    """Read no number."""


class Metrics:
    """Counters of one service, in a separate registry.

    Args:
        queue: Returns the number of requests that wait.
    """

    def __init__(self, queue: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._requests = Counter(
            "gates_requests", "Requests to /score", ["status"], registry=self.registry
        )
        self._seconds = Histogram(
            "gates_request_seconds",
            "From the first byte of a scored request to its answer",
            buckets=SECONDS,
            registry=self.registry,
        )
        self._batch_requests = Histogram(
            "gates_batch_requests", "Requests scored at once", buckets=REQUESTS,
            registry=self.registry,
        )  # fmt: skip
        self._batch_rows = Histogram(
            "gates_batch_rows", "Rows scored at once", buckets=ROWS, registry=self.registry
        )
        waiting = Gauge("gates_queue_requests", "Requests that wait", registry=self.registry)
        waiting.set_function(queue)
        self._model = Info("gates_model", "Model in service", registry=self.registry)
        self._swaps = Counter(
            "gates_swaps", "New model folders, by what became of them", ["outcome"],
            registry=self.registry,
        )  # fmt: skip
        self._numbers = Counter(
            "gates_numbers", "Numbers outside those of training, and shifted medians of requests",
            ["field", "what"], registry=self.registry,
        )  # fmt: skip
        for outcome in ("swapped", "refused"):
            self._swaps.labels(outcome)

    def request(self, status: int, seconds: float) -> None:
        """Count a request; its time only if it was scored."""
        self._requests.labels(str(status)).inc()
        if status == 200:
            self._seconds.observe(seconds)

    def batch(self, requests: int, rows: int) -> None:
        """Count a batch."""
        self._batch_requests.observe(requests)
        self._batch_rows.observe(rows)

    def numbers(self, found: Mapping[str, Mapping[str, int]]) -> None:
        """Count numbers ``outside`` those of training and ``shifted`` medians, field by field."""
        for field, counts in found.items():
            for what, count in counts.items():
                self._numbers.labels(field, what).inc(count)

    def model(self, version: str) -> None:
        """Note which model is in service."""
        self._model.info({"version": version})

    def swap(self, outcome: str) -> None:
        """Count a new model folder that was ``swapped`` in or ``refused``."""
        self._swaps.labels(outcome).inc()

    def text(self) -> bytes:
        """Return all of it in the text format of Prometheus."""
        return generate_latest(self.registry)


class Service:
    """A model folder, the thread that scores with it, and the counters.

    Args:
        place: Folder, link or manifest, see
            `video_multitask.service.serving_model.find_model`.
        load: Loads a folder.
        limits: Of requests and batches.
        poll_s: Seconds between two looks at the folder.

    Raises:
        GatesError: The model cannot be loaded.
    """

    def __init__(
        self, place: Path, load: Loader, limits: Limits | None = None, poll_s: float = 1.0
    ) -> None:
        self.limits = limits or Limits()
        self.metrics = Metrics(lambda: len(self.batcher))
        self.models = Models(place, load, self._swapped, poll_s)
        self.metrics.model(self.models.current.version)
        self._under_way = 0
        self.batcher = Batcher(self.limits, self.metrics.batch)

    @property
    def ready(self) -> bool:
        """Whether requests are scored."""
        return self.batcher.alive

    async def score(self, request: Request) -> tuple[Any, str]:
        """Return the answer to a request and the version of the model.

        Raises:
            GatesError: The request is wrong, or cannot be taken now.
        """
        self.batcher.require_room()
        if self._under_way >= self.limits.max_queue + 2 * self.limits.max_batch_requests:
            raise RefusedError(f"{self._under_way} requests are under way: try again", 429)
        self._under_way += 1
        try:
            return await self._scored(request)
        finally:
            self._under_way -= 1

    async def _scored(self, request: Request) -> tuple[Any, str]:
        body = await read_body(request, self.limits)
        scorer = self.models.current

        def read() -> Any:
            return scorer.read(parse(body, self.limits.max_rows), self.limits.max_rows)

        wanted = read() if len(body) < LARGE else await asyncio.to_thread(read)
        future = asyncio.wrap_future(self.batcher.submit(scorer, wanted))
        try:
            arrays = await asyncio.wait_for(future, self.limits.timeout_s)
        except TimeoutError as error:
            line = f"not scored within {self.limits.timeout_s:g} s: try again"
            raise RefusedError(line, 503) from error
        for name, array in arrays.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise ValueError(f"{name} is not finite in the results of {scorer.version}")
        answer = scorer.answer(wanted, arrays)
        self.metrics.numbers(answer.get("numbers", {}) if isinstance(answer, dict) else {})
        return answer, scorer.version

    def close(self) -> None:
        """Finish what waits, then stop."""
        self.models.close()
        self.batcher.close()

    def _swapped(self, outcome: str) -> None:
        self.metrics.swap(outcome)
        self.metrics.model(self.models.current.version)


def build_app(service: Service) -> FastAPI:
    """Return the application of a service; it watches the model folder while it runs."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.models.start()
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(lifespan=lifespan, openapi_url=None)  # its pages would load foreign scripts

    @app.exception_handler(HTTPException)
    async def refuse(_: Request, error: HTTPException) -> Response:
        return _json({"error": str(error.detail)}, error.status_code)

    @app.get("/healthz")
    async def health() -> Response:
        return _json({"status": "alive"})

    @app.get("/readyz")
    async def readiness() -> Response:
        version = service.models.current.version
        status = "ready" if service.ready else "shutting down"
        return _json({"status": status, "model": version}, 200 if service.ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.post("/score")
    async def score(request: Request) -> Response:
        begin = time.perf_counter()
        response = await _answer(service, request)
        service.metrics.request(response.status_code, time.perf_counter() - begin)
        return response

    return app


async def _answer(service: Service, request: Request) -> Response:
    """Return the answer to a request, or one line that explains why there is none."""
    try:
        answer, version = await service.score(request)
        response = _json(answer)
        response.headers["x-model-version"] = quote(version, safe=" ")
        return response
    except GatesError as error:
        status = error.status if isinstance(error, RefusedError) else 422
        response = _json({"error": " ".join(str(error).split())}, status)
        if status in (429, 503):
            response.headers["retry-after"] = "1"
        return response
    except Exception as error:
        LOG.exception("a request failed")
        line = f"the service failed, its log holds the details: {type(error).__name__}"
        return _json({"error": line}, 500)


def _json(content: Any, status: int = 200) -> Response:
    return Response(to_json(content, inf_nan_mode="null"), status, media_type="application/json")


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to a port, to a free one for 0.

    Raises:
        GatesError: The port is taken, out of range, or the host is not of this machine.
    """
    if not 0 <= port <= 65535:
        raise GatesError(f"--port must lie between 0 and 65535, found {port}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Only of a socket of this protocol does asyncio let small answers leave at once (TCP_NODELAY).
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise GatesError(
            f"cannot serve at {host}, port {port}: {error.strerror or error}; give another --port, "
            "or 0, or another --host"
        ) from error
    return bound


class Server(uvicorn.Server):
    """A server that ends at SIGINT or SIGTERM, after the requests that it has accepted.

    Args:
        app: Application.
        grace_s: Seconds that requests have to end.
    """

    def __init__(self, app: FastAPI, grace_s: float = 30.0) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                ws="none",
                timeout_graceful_shutdown=int(grace_s),
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End; at a second SIGINT, at once. The signal is not raised again afterwards."""
        del frame
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True


def serve(
    service: Service, bound: socket.socket, notify: Callable[[str], object], grace_s: float = 30.0
) -> None:
    """Answer requests until a signal ends it.

    Args:
        service: What is served; closed at the end.
        bound: Of `bind`.
        notify: Called with the address, once clients may connect.
        grace_s: Seconds that requests have to end.
    """
    host, port = bound.getsockname()[:2]
    bound.listen(2048)  # clients may connect from now on; they are answered in a moment
    notify(f"http://{f'[{host}]' if ':' in host else host}:{port}")
    Server(build_app(service), grace_s).run(sockets=[bound])


def log_to_stderr() -> None:
    """Show the log of the service as plain lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("gates.service")
    logger.setLevel(logging.INFO)
    logger.handlers = [handler]
    logger.propagate = False
