"""Many clients at once on loopback: errors, throughput, latency, memory, the gain of batching."""

import asyncio
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, NamedTuple

import numpy as np

from core_gates.errors import GatesError
from harness.service.client import Connection, Running, running

Kept = Mapping[tuple[int, str], bytes]
"""The last answer to each body by each model: (place of the body, version) -> content."""


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
