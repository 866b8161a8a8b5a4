import mmap
import subprocess
import sys
import time

import pytest

from harness.runs.resident import MemoryMeter, descendants, resident

MB = 10**6
HOLD = "import sys; a = bytearray({size} * 10**6); print('ready', flush=True); sys.stdin.read()"


@pytest.fixture
def holder():
    """A process with 60 MB that has started another with 90 MB."""
    inner = HOLD.format(size=90)
    code = (
        "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', sys.argv[1]], "
        "stdin=subprocess.PIPE, stdout=subprocess.PIPE); p.stdout.readline(); "
    ) + HOLD.format(size=60)
    process = subprocess.Popen(
        [sys.executable, "-c", code, inner], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    process.stdout.readline()
    yield process
    process.communicate()


def test_a_process_counts_with_its_descendants(holder):
    (child,) = descendants(holder.pid)
    own, both = resident(child), resident(holder.pid)
    assert 90 * MB < own < 120 * MB
    assert 150 * MB < both < 200 * MB
    assert holder.pid in descendants(subprocess.os.getpid())


def test_a_process_that_has_ended_takes_nothing():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert resident(process.pid) == 0
    assert descendants(process.pid) == []


def test_the_meter_keeps_the_peak():
    with MemoryMeter(every=0.01) as meter:
        before = meter.sample()
        held = mmap.mmap(-1, 80 * MB)  # its pages return at once, whatever the allocator keeps
        for page in range(0, len(held), mmap.PAGESIZE):
            held[page] = 1
        time.sleep(0.1)
        held.close()
        after = meter.sample()
    assert meter.peak > before + 70 * MB
    assert after < before + 40 * MB
