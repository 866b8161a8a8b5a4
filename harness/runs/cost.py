"""What variants of a computation cost: seconds and memory of a step."""

import gc
import time
from collections.abc import Callable, Mapping
from statistics import median

from torch.profiler import ProfilerActivity, profile

ROUNDS = 5


def interleaved_seconds(
    functions: Mapping[str, Callable[[], object]], rounds: int = ROUNDS
) -> dict[str, float]:
    """Return the median seconds of each function, see `interleaved_times`."""
    return {name: median(times) for name, times in interleaved_times(functions, rounds).items()}


def interleaved_times(
    functions: Mapping[str, Callable[[], object]], rounds: int = ROUNDS
) -> dict[str, list[float]]:
    """Return the seconds of all calls of each function, interleaved, after one call each.

    Args:
        functions: Name -> function.
        rounds: Calls of each.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - begin)
    return times


def peak_bytes(function: Callable[[], object]) -> int:
    """Return the most memory of tensors on the CPU that a call holds above what there was."""
    function()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        function()
    events = seen.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    held = most = 0
    for _, change in sorted(changes):
        held += change
        most = max(most, held)
    return most
