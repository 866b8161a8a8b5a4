"""Work is spread by spawned processes, so that each test is a separate script."""

import os
import signal
import time

import pytest

SCRIPT = """
import logging, os, time
import torch
from harness.runs.processes import Pool, in_processes

logging.getLogger("lightning.pytorch").setLevel(logging.INFO)  # as importing it does

class Work:
    factor = 3
    def run(self, number, tick):
        if number < 0:
            raise ValueError("broken")
        print(os.getpid(), flush=True)
        for _ in range(4):
            tick()
            time.sleep({seconds})
        import scipy.linalg
        from threadpoolctl import threadpool_info
        blas = [i["num_threads"] for i in threadpool_info() if "scipy.libs" in i["filepath"]]
        assert {threads} == 1 or set(blas) == {{1}}, blas
        loud = logging.getLogger("lightning.pytorch").isEnabledFor(logging.INFO)
        return self.factor * number, torch.get_num_threads(), loud, os.getpid()

if __name__ == "__main__":
    torch.set_num_threads({threads})
    ticks, numbers = [], [1, 2, 3, 4]
    pool = Pool()
    run = in_processes if {threads} == 1 else pool.run
    found = run(Work().run, [(n,) for n in numbers], lambda: ticks.append(1))
    assert [value for value, *_ in found] == [3 * n for n in numbers], found
    assert {{threads for _, threads, *_ in found}} == {{1}}
    assert {threads} == 1 or not any(loud for *_, loud, _ in found)  # adverts of Lightning
    assert len(ticks) == 4 * len(found)
    print(len({{pid for *_, pid in found}} - {{os.getpid()}}), "others")
    try:
        run(Work().run, [(n,) for n in (1, -1, 2)], lambda: None)
    finally:
        pool.close()
"""


@pytest.fixture
def start(forked, tmp_path):
    def run(threads, seconds=0.25):
        script = tmp_path / "work.py"
        script.write_text(SCRIPT.format(threads=threads, seconds=seconds))
        return forked.Forked([str(script)])

    return run


@pytest.mark.costly("two spawned processes that import torch")
@pytest.mark.parametrize(("threads", "others"), [(1, 0), (2, 2)])
def test_every_piece_is_done_once_ticks_arrive_and_a_failure_is_raised_here(start, threads, others):
    process = start(threads)
    said = process.communicate(timeout=120)[1].decode().splitlines()
    assert (process.returncode, said[-1]) == (1, "ValueError: broken")
    assert f"{others} others" in said


@pytest.mark.costly("two spawned processes that import torch")
def test_no_process_outlives_a_killed_parent(start):
    process, deadline = start(2, seconds=30), time.monotonic() + 60
    while len(said := process.log.read_text().splitlines()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = set(map(int, said))
    assert len(workers - {process.pid}) == 2
    os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while any(map(_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(_alive, workers))


def _alive(pid):
    try:
        os.kill(pid, signal.SIG_DFL)
    except ProcessLookupError:
        return False
    return True
