"""A lean client: one connection that stays open, and a service in its own process."""

import asyncio
import re
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, NamedTuple
from urllib.parse import unquote, urlsplit

from core_gates.errors import GatesError
from harness.runs.dependent import dependent

READY_S = 120.0  # seconds that a service has to load its model


class Answer(NamedTuple):
    """What came back.

    Attributes:
        status: Of HTTP; 0 if the connection broke.
        body: Content.
        version: Model that answered; empty if none did.
    """

    status: int
    body: bytes
    version: str = ""


class Connection:
    """One connection to a service, for one request after the other.

    A client of this kind costs 0.05 ms a request, so that a service and its load fit on two cores.

    Args:
        url: Address of the service.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.host, self.port = parts.hostname or "", parts.port or 80
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, path: str, body: bytes) -> Answer:
        """Return the answer to a POST request; status 0 with the reason if the connection broke."""
        try:
            if self._streams is None:
                self._streams = await asyncio.open_connection(self.host, self.port)
            reader, writer = self._streams
            head = (
                f"POST {path} HTTP/1.1\r\nHost: {self.host}\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            writer.write(head.encode() + body)
            await writer.drain()
            lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            fields = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
            content = await reader.readexactly(int(fields["content-length"]))
            if fields.get("connection") == "close":
                self.close()
            version = next((x[17:] for x in lines if x.lower().startswith("x-model-version: ")), "")
            return Answer(int(lines[0].split()[1]), content, unquote(version))
        except (OSError, asyncio.IncompleteReadError, KeyError, ValueError) as error:
            self.close()
            return Answer(0, f"{type(error).__name__}: {error}".encode())

    def close(self) -> None:
        """End the connection."""
        if self._streams is not None:
            self._streams[1].close()
        self._streams = None


class Running(NamedTuple):
    """A service in a process.

    Attributes:
        url: Its address.
        process: The process.
    """

    url: str
    process: "subprocess.Popen[str]"

    def metric(self, name: str) -> float:
        """Return a sample of its metrics; NaN if there is none."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            found = re.search(rf"^{re.escape(name)} (\S+)$", answer.read().decode(), re.MULTILINE)
        return float(found[1]) if found else float("nan")

    @property
    def resident_bytes(self) -> float:
        """Memory of the process."""
        return self.metric("process_resident_memory_bytes")


@contextmanager
def running(command: Sequence[str]) -> Iterator[Running]:
    """Start a service, which prints its address first, wait until it is ready, and end it.

    It ends with this process, too, if that is killed.

    Raises:
        GatesError: It ends, or is not ready in time; the last line that it printed is named.
    """
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            dependent(command), stdout=subprocess.PIPE, stderr=log, text=True
        ) as process,
    ):
        try:
            yield Running(_address(process, log), process)
        finally:
            process.terminate()
            try:
                process.communicate(timeout=40)
            except subprocess.TimeoutExpired:
                process.kill()


def _address(process: "subprocess.Popen[str]", log: IO[str]) -> str:
    assert process.stdout is not None
    url = ""
    for line in process.stdout:
        if line.startswith("http://"):
            url = line.strip()
            break
    end = time.monotonic() + READY_S
    while url and process.poll() is None and time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=5):
                return url
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    process.kill()
    process.wait()
    log.seek(0)
    said = (log.read().strip().splitlines() or ["it printed nothing"])[-1]
    raise GatesError(f"the service did not get ready: {said}")
