"""Timing on a shared machine: variants interleaved, medians, limits of the same moment."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

ROUNDS = 7
SAMPLE_SECONDS = 0.1


class Timing(NamedTuple):
    """Times of one variant.

    Attributes:
        seconds: Seconds a call, one entry per round.
        first: Seconds of the very first call.
    """

    seconds: list[float]
    first: float

    @property
    def median(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.seconds)


def interleave(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int = ROUNDS,
    sample_seconds: float = SAMPLE_SECONDS,
    clock: Callable[[], float] = time.perf_counter,
    first_clock: Callable[[], float] | None = None,
) -> dict[str, Timing]:
    """Time every call once a round, so that a busy moment affects all of them.

    A sample repeats short calls until it lasts ``sample_seconds``. The order is turned around every
    round, so that no call always follows the same neighbor.

    Args:
        calls: Functions by name.
        rounds: Samples of each.
        sample_seconds: Least duration of a sample.
        clock: Clock in seconds.
        first_clock: Clock of the first call, which may compile in other processes; ``clock`` if
            None.
    """
    first: dict[str, float] = {}
    repeats: dict[str, int] = {}
    for name, call in calls.items():
        first[name] = _sample(call, 1, first_clock or clock)
        repeats[name] = max(1, round(sample_seconds / max(_sample(call, 1, clock), 1e-7)))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        names = list(calls)[:: 1 if number % 2 == 0 else -1]
        for name in names:
            seconds[name].append(_sample(calls[name], repeats[name], clock) / repeats[name])
    return {name: Timing(seconds[name], first[name]) for name in calls}


def mixed(timings: Mapping[str, Timing], shares: Mapping[str, float], revision: str = "") -> Timing:
    """Time of a call that is a weighted sum of others, of another revision if one is named."""
    suffix = f"@{revision}" if revision else ""
    parts = [(share, timings[name + suffix]) for name, share in shares.items()]
    seconds = [[share * second for second in timing.seconds] for share, timing in parts]
    first = sum(share * timing.first for share, timing in parts)
    return Timing([sum(each) for each in zip(*seconds, strict=True)], first)


def ratio(timing: Timing, baseline: Timing) -> float:
    """Median over the rounds of the ratio within each round."""
    pairs = zip(timing.seconds, baseline.seconds, strict=True)
    return statistics.median(mine / theirs for mine, theirs in pairs)


def limit_calls(device: torch.device) -> tuple[dict[str, Callable[[], object]], dict[str, float]]:
    """The machine's limits as calls to be timed among the others.

    Returns:
        The calls ``gemm`` (float32 matmul) and ``stream`` (copy of a large array), and the
        floating-point operations and the bytes of one call of each.
    """
    size, length = (4096, 2**28) if device.type == "cuda" else (768, 2**24)
    left, right = (torch.rand(size, size, device=device) for _ in range(2))
    product = torch.empty_like(left)
    source = torch.rand(length, device=device)
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], object]] = {
        "gemm": lambda: torch.mm(left, right, out=product),
        "stream": lambda: target.copy_(source),
    }
    return calls, {"gemm": 2.0 * size**3, "stream": 8.0 * length}


def _sample(call: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    _wait()
    begin = clock()
    for _ in range(repeats):
        call()
    _wait()
    return clock() - begin


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
