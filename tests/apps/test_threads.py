import threading

import pytest
import torch

from apps.threads import in_threads


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_jobs_run_at_once_with_one_thread_of_torch_each(two_threads):
    both, seen, ticks = threading.Barrier(2, timeout=20), [], []

    def job(tick):
        both.wait()  # passes only if another job is running
        seen.append(torch.get_num_threads())
        tick()

    in_threads([job, job], lambda: ticks.append(1))
    assert seen == [1, 1]
    assert ticks == [1, 1]
    assert torch.get_num_threads() == 2


def test_the_first_failure_stops_the_others(two_threads):
    started, endless = threading.Event(), []

    def fails(tick):
        started.wait(20)
        raise ValueError("broken")

    def works(tick):
        while True:
            started.set()
            tick()

    with pytest.raises(ValueError, match="broken"):
        in_threads([fails, works, lambda tick: endless.append(1)], lambda: None)
    assert endless == []
    assert torch.get_num_threads() == 2
