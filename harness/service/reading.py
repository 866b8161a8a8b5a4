"""The body of a request: read within limits, then parsed as strict JSON."""

import asyncio
from typing import Any

from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request

from harness.service.scorer import Limits, RefusedError

DRAINED = 16  # times the limit that is read and dropped, so that a client sees the refusal


async def read_body(request: Request, limits: Limits) -> bytes:
    """Return the body of a request.

    Raises:
        RefusedError: 413, longer than the limit; 408, did not arrive in time; 400, the client left.
    """
    try:
        async with asyncio.timeout(limits.timeout_s):
            return await _within(request, limits.max_body_bytes)
    except TimeoutError as error:
        raise RefusedError(f"the body did not arrive within {limits.timeout_s:g} s", 408) from error
    except ClientDisconnect as error:
        raise RefusedError("the client has left", 400) from error


async def _within(request: Request, most: int) -> bytes:
    announced = request.headers.get("content-length", "")
    size = int(announced) if announced.isdigit() else 0
    parts: list[bytes] = []
    read = 0
    async for part in request.stream():
        read += len(part)
        if max(size, read) <= most:
            parts.append(part)
        else:
            parts.clear()
            if read > DRAINED * most:
                break
    if max(size, read) > most:
        raise RefusedError(
            f"the body has {max(size, read):,} bytes or more, at most {most:,} are taken: send "
            "fewer rows at a time",
            413,
        )
    return b"".join(parts)


def parse(body: bytes) -> Any:
    """Parse strict JSON: UTF-8, no NaN, no infinity.

    Raises:
        RefusedError: 400; names line and column.
    """
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise RefusedError(f"the body is no JSON: {error}", 400) from error
