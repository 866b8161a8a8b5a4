"""Memory that a call needs at once."""

from collections.abc import Callable
from itertools import accumulate

from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], object]) -> int:
    """Return the largest number of bytes on the CPU that a call has allocated at a time.

    What exists before the call does not count, and what torch does not allocate is not seen.
    """
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        found = call()
        del found
    assert profiled.profiler is not None
    results = profiled.profiler.kineto_results
    assert results is not None
    events = [event for event in results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))
