"""Many clients at once on loopback: errors, throughput, latency, memory, the gain of batching."""

import asyncio
import re
import statistics
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import IO, Any, NamedTuple
from urllib.parse import unquote, urlsplit

import numpy as np

from core_gates.errors import GatesError
from harness.system import dependent

READY_S = 120.0  # seconds that a service has to load its model
Kept = Mapping[tuple[int, str], bytes]
"""The last answer to each body by each model: (place of the body, version) -> content."""


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
            match = re.search(rf"^{re.escape(name)} (\S+)$", answer.read().decode(), re.MULTILINE)
        return float(match[1]) if match else float("nan")

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


class Load(NamedTuple):
    """What clients have seen.

    Attributes:
        seconds: From the first request to the last answer.
        latencies: Seconds of each answered request.
        errors: Status and beginning of each answer that is none.
        kept: Answers for comparison.
        versions: Requests answered by each model.
    """

    seconds: float
    latencies: Sequence[float]
    errors: Sequence[str]
    kept: Kept
    versions: Mapping[str, int]

    @property
    def throughput(self) -> float:
        """Answers a second."""
        return len(self.latencies) / self.seconds

    def latency_ms(self, quantile: float) -> float:
        """Return a quantile of the latencies; NaN without answers."""
        return float(np.quantile(self.latencies, quantile)) * 1000 if self.latencies else np.nan


class Verdict(NamedTuple):
    """What a load test has found.

    Attributes:
        requests: Answered requests.
        errors: Requests without a proper answer.
        first_error: One of them.
        versions: Models that have answered; two if the swap was seen.
        throughput: Requests answered a second, with a swap in the middle.
        p50_ms: Median latency.
        p99_ms: 99 % of the latencies lie below.
        growth: Resident memory at the end over that after warming up, minus 1.
        batching_gain: Throughput with batching over that without, the median of paired slices.
        difference: Largest difference between online and offline results; NaN if not compared.
    """

    requests: int
    errors: int
    first_error: str
    versions: int
    throughput: float
    p50_ms: float
    p99_ms: float
    growth: float
    batching_gain: float
    difference: float


class LoadTest(NamedTuple):
    """A load and what it is compared with.

    Attributes:
        command: Returns the command line of a service, with batching or without; the service
            prints its address first.
        bodies: Bodies of requests, sent by all clients over and over, each from another place.
        swap: Brings another model into service.
        difference: Returns the largest difference of an answer from the offline result, given the
            place of its body, the version of the model and the content.
        clients: Number of clients; each waits for its answer before it asks again.
        seconds: Duration of the main load.
        slice_s: Duration of each of the slices with and without batching.
        slices: Number of pairs of slices.
        during: Returns a context around each phase, given what is being done, such as a progress.
    """

    command: Callable[[bool], Sequence[str]]
    bodies: Sequence[bytes]
    swap: Callable[[], Any]
    difference: Callable[[int, str, bytes], float]
    clients: int = 50
    seconds: float = 30.0
    slice_s: float = 2.0
    slices: int = 3
    during: Callable[[str], AbstractContextManager[object]] = nullcontext

    def run(self) -> Verdict:
        """Run the main load with a swap in the middle, then slices with and without batching.

        Raises:
            GatesError: A service does not get ready, or all requests of a load fail.
        """
        settling = max(self.slice_s, self.seconds / 5)  # memory settles
        alone = (2 * self.slices + 1) * self.slice_s
        with ExitStack() as services:
            with self.during("starting the service"):
                batching = services.enter_context(running(self.command(True)))
            with self.during(f"warming up, {settling:.0f} s"):
                self._load(batching, settling)
            before = batching.resident_bytes
            with self.during(f"{self.clients} clients and a swap, {self.seconds:.0f} s"):
                load = self._load(batching, self.seconds, self.swap)
            growth = batching.resident_bytes / before - 1
            with self.during("starting a service without batching"):
                single = services.enter_context(running(self.command(False)))
            with self.during(f"with and without batching, {alone:.0f} s"):
                gain = self._gain(batching, single)
        with self.during("comparing with `score`"):
            differences = [self.difference(*key, content) for key, content in load.kept.items()]
        return Verdict(
            len(load.latencies),
            len(load.errors),
            load.errors[0] if load.errors else "",
            len(load.versions),
            load.throughput,
            load.latency_ms(0.5),
            load.latency_ms(0.99),
            growth,
            gain,
            max(differences, default=float("nan")),
        )

    def _gain(self, batching: Running, single: Running) -> float:
        self._load(single, self.slice_s)
        pairs = [
            (self._load(batching, self.slice_s), self._load(single, self.slice_s))
            for _ in range(self.slices)
        ]
        return statistics.median(a.throughput / b.throughput for a, b in pairs)

    def _load(
        self, service: Running, seconds: float, at_half: Callable[[], Any] | None = None
    ) -> Load:
        load = attack(
            service.url, self.bodies, clients=self.clients, seconds=seconds, at_half=at_half
        )
        if not load.latencies:
            said = f": {load.errors[0]}" if load.errors else ""
            raise GatesError(f"all requests failed{said}")
        return load


def attack(
    url: str,
    bodies: Sequence[bytes],
    *,
    clients: int,
    seconds: float,
    at_half: Callable[[], Any] | None = None,
) -> Load:
    """Send bodies from many clients at once, each waiting for its answer before it asks again.

    Args:
        url: Address of the service.
        bodies: Bodies of requests to ``/score``.
        clients: Number of connections.
        seconds: No request begins later.
        at_half: Called once, by another thread, after half of the time.
    """
    return asyncio.run(_attack(url, bodies, clients, seconds, at_half))


async def _attack(
    url: str,
    bodies: Sequence[bytes],
    clients: int,
    seconds: float,
    at_half: Callable[[], Any] | None,
) -> Load:
    latencies: list[float] = []
    errors: list[str] = []
    kept: dict[tuple[int, str], bytes] = {}
    versions: dict[str, int] = {}
    begin = time.perf_counter()

    async def client(number: int) -> None:
        connection = Connection(url)
        place = number * len(bodies) // clients
        while (asked := time.perf_counter()) < begin + seconds:
            answer = await connection.post("/score", bodies[place])
            if answer.status == 200:
                latencies.append(time.perf_counter() - asked)
                kept[place, answer.version] = answer.body
                versions[answer.version] = versions.get(answer.version, 0) + 1
            else:
                errors.append(f"{answer.status} {answer.body[:200].decode(errors='replace')}")
                await asyncio.sleep(0.01)
            place = (place + 1) % len(bodies)
        connection.close()

    async def halfway() -> None:
        await asyncio.sleep(seconds / 2)
        if at_half is not None:
            await asyncio.to_thread(at_half)

    await asyncio.gather(halfway(), *(client(number) for number in range(clients)))
    return Load(time.perf_counter() - begin, latencies, errors, kept, versions)
