"""The service as an ASGI application: ``/score``, ``/healthz``, ``/readyz``, ``/metrics``."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic_core import to_json
from starlette.exceptions import HTTPException

from core_gates.errors import GatesError
from harness.service.batching import Batcher
from harness.service.metrics import Metrics
from harness.service.reading import parse, read_body
from harness.service.scorer import Limits, RefusedError
from harness.service.swapping import Loader, Models

LOG = logging.getLogger("gates.service")
LARGE = 2**18  # bytes of a body that is parsed by another thread, so that others are answered


class Service:
    """A model folder, the thread that scores with it, and the counters.

    Args:
        place: Folder, link or manifest, see :func:`harness.service.swapping.find_model`.
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
            found = await asyncio.wait_for(future, self.limits.timeout_s)
        except TimeoutError as error:
            line = f"not scored within {self.limits.timeout_s:g} s: try again"
            raise RefusedError(line, 503) from error
        for name, array in found.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise ValueError(f"{name} is not finite in the results of {scorer.version}")
        return scorer.answer(wanted, found), scorer.version

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
