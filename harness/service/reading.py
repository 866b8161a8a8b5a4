"""The body of a request: read within limits, then parsed as strict JSON."""

import asyncio
import json
from typing import Any

from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request

from harness.service.scorer import Limits, RefusedError

CONTAINERS = 64  # lists and mappings for each row that a request may have
FEWEST = 2**17  # lists and mappings that are taken in any case; a million would stall all others


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
        if (found := max(self.size, self.read)) > self.most:
            raise RefusedError(
                f"the body has {found:,} bytes or more, at most {self.most:,} are taken: send "
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
    found, most = body.count(b"[") + body.count(b"{"), max(FEWEST, CONTAINERS * max_rows)
    if found > most:
        raise RefusedError(
            f"the body has {found:,} lists and mappings, at most {most:,} are taken: send fewer "
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
