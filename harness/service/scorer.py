"""What a service scores with, what it refuses, and what it is limited to."""

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from numpy.typing import NDArray

from core_gates.errors import GatesError, check_at_least, check_positive

Arrays = Mapping[str, NDArray[Any]]
"""Results by name, all with the rows as their leading dimension."""

R = TypeVar("R", bound=Sized)


class RefusedError(GatesError):
    """A request that is not scored.

    Args:
        line: What was found, what was expected; names field and row.
        status: Of HTTP.
    """

    def __init__(self, line: str, status: int = 422) -> None:
        super().__init__(line)
        self.status = status


class Scorer(Protocol[R]):
    """A model in memory; a request ``R`` is anything whose length is its number of rows."""

    @property
    def version(self) -> str:
        """Name of the model; two models with other weights have other names."""

    @property
    def interface(self) -> Mapping[str, str]:
        """What requests and answers hold, by name; one model replaces another of the same only."""

    def warm_up(self) -> None:
        """Score made-up rows, so that the first request does not wait for lazy initialization.

        Raises:
            Exception: The model is of no use; it is not put into service.
        """

    def read(self, content: Any, max_rows: int) -> R:
        """Check the JSON content of a request, completely: what passes can be scored.

        Raises:
            GatesError: A field is missing, unknown or of a wrong type, or there are too many rows.
        """

    def score(self, requests: Sequence[R]) -> Arrays:
        """Score the rows of all requests at once, in order; called by one thread only."""

    def answer(self, request: R, found: Arrays) -> Any:
        """Return the answer to a request, in values of JSON, given the results of its rows."""


@dataclass(frozen=True)
class Limits:
    """What protects a service, and how it forms batches.

    Attributes:
        max_body_bytes: Bytes of a request; longer ones get 413.
        max_rows: Rows of a request; more get 422, and many more lists and mappings than rows 413.
        max_queue: Requests that wait; beyond that, 429.
        timeout_s: Seconds from arrival to result; later, 503.
        max_wait_ms: Milliseconds that the first request of a batch waits for others.
        max_batch_rows: Rows that are scored at once; a longer request is scored by itself.
        max_batch_requests: Requests that are scored at once; 1: no batching.

    Raises:
        ValueError: A limit is below 1, or a time is not positive.
    """

    max_body_bytes: int = 4 * 2**20
    max_rows: int = 2000
    max_queue: int = 256
    timeout_s: float = 10.0
    max_wait_ms: float = 2.0
    max_batch_rows: int = 4096
    max_batch_requests: int = 64

    def __post_init__(self) -> None:
        """Check that each limit lets something pass."""
        check_at_least(
            1,
            max_body_bytes=self.max_body_bytes,
            max_rows=self.max_rows,
            max_queue=self.max_queue,
            max_batch_rows=self.max_batch_rows,
            max_batch_requests=self.max_batch_requests,
        )
        check_positive(timeout_s=self.timeout_s)
        check_at_least(0, max_wait_ms=self.max_wait_ms)
