"""Work is spread by spawned processes, so that each test is a separate script."""

import os
import signal
import subprocess
import sys
import time

import pytest

SCRIPT = """
import logging, os, sys, time
import {module}
import torch
from harness.runs.processes import in_processes

class Work:
    factor = 3
    def run(self, number, tick):
        if number < 0:
            raise ValueError("broken")
        print(os.getpid(), flush=True)
        for _ in range(4):
            tick()
            time.sleep({seconds})
        loud = logging.getLogger("lightning.pytorch").isEnabledFor(logging.INFO)
        return self.factor * number, torch.get_num_threads(), loud, os.getpid()

if __name__ == "__main__":
    torch.set_num_threads({threads})
    ticks = []
    found = in_processes(Work().run, [(n,) for n in {numbers}], lambda: ticks.append(1))
    assert [value for value, *_ in found] == [3 * n for n in {numbers}], found
    assert {{threads for _, threads, *_ in found}} == {{1}}
    assert {threads} == 1 or not any(loud for *_, loud, _ in found)  # adverts of Lightning
    assert len(ticks) == 4 * len(found)
    print(len({{pid for *_, pid in found}} - {{os.getpid()}}), "others")
"""


@pytest.fixture
def start(tmp_path):
    def run(**values):
        values = {"threads": 2, "numbers": [1, 2, 3, 4], "seconds": 0.1, "module": "torch"} | values
        script = tmp_path / "work.py"
        script.write_text(SCRIPT.format(**values))
        pipe = subprocess.PIPE
        return subprocess.Popen([sys.executable, script], stdout=pipe, stderr=pipe, text=True)

    return run


@pytest.mark.parametrize(("threads", "others"), [(1, 0), (2, 2)])
def test_every_piece_is_done_once_and_ticks_arrive(start, threads, others):
    process = start(threads=threads, module="lightning.pytorch")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.splitlines()[-1] == f"{others} others"


def test_a_failure_is_raised_here(start):
    process = start(numbers=[1, -1, 2])
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert err.splitlines()[-1] == "ValueError: broken"


def test_no_process_outlives_a_killed_parent(start):
    with start(seconds=30) as process:
        workers = {int(process.stdout.readline()) for _ in range(2)}
        assert process.pid not in workers
        process.kill()
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
