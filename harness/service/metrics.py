"""What a service shows of itself, for Prometheus."""

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    generate_latest,
)

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
REQUESTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
ROWS = (1, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)


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

    def model(self, version: str) -> None:
        """Note which model is in service."""
        self._model.info({"version": version})

    def swap(self, outcome: str) -> None:
        """Count a new model folder that was ``swapped`` in or ``refused``."""
        self._swaps.labels(outcome).inc()

    def text(self) -> bytes:
        """Return all of it in the text format of Prometheus."""
        return generate_latest(self.registry)
