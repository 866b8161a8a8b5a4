import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.system import MemoryMeter, dependent, descendants, resident, return_freed_memory

SCRIPT = """
import resource
import torch
from harness.system import keep_freed_memory

kept = keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(kept, faults())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="settings of glibc")
@pytest.mark.parametrize("own", [{}, {"MALLOC_ARENA_MAX": "2"}])
def test_large_buffers_come_back_without_page_faults(own):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | own
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    kept, faults = done.stdout.split()
    assert (kept == "True", int(faults) < 100) == (not own, not own)


linux = pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is of Linux")
WAIT = "import sys, time; print('ready', flush=True); time.sleep(60)"


def alive(pid):
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ended(pid, seconds=10):
    end = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive(pid)


def parent_of(child):
    """A process that starts a command, prints its number when it is ready, and waits."""
    code = (
        "import signal, subprocess, sys, time; from harness.system import dependent; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "  # ignored in the background
        f"p = subprocess.Popen({child}, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL); "
        "p.stdout.readline(); print(p.pid, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    return process, int(process.stdout.readline())


@linux
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_child_ends_with_its_parent(how):
    parent, pid = parent_of(f"dependent([sys.executable, '-c', {WAIT!r}])")
    assert alive(pid)
    parent.send_signal(how)
    parent.communicate()
    assert ended(pid)


def test_words_environment_and_exit_code_are_those_of_the_command():
    code = "import os, sys; print(sys.argv[1:], os.environ['KEPT']); sys.exit(7)"
    command = dependent([sys.executable, "-c", code, "a b", "--c", ""])
    environment = {**subprocess.os.environ, "KEPT": "ü"}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (7, "['a b', '--c', ''] ü\n")


def test_a_child_whose_parent_has_ended_before_does_not_begin(monkeypatch):
    monkeypatch.setattr("os.getpid", lambda: 2**22 + 1)
    command = dependent([sys.executable, "-c", "print('begun')"])
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ((found.returncode, found.stdout), found.stderr) == ((1, ""), "its parent has ended\n")


MB = 10**6
HOLD = "import sys; a = bytearray({size} * 10**6); print('ready', flush=True); sys.stdin.read()"


@pytest.fixture
def holder():
    """A process with 300 MB that has started another with 200 MB."""
    inner = HOLD.format(size=200)
    code = (
        "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', sys.argv[1]], "
        "stdin=subprocess.PIPE, stdout=subprocess.PIPE); p.stdout.readline(); "
    ) + HOLD.format(size=300)
    process = subprocess.Popen(
        [sys.executable, "-c", code, inner], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    process.stdout.readline()
    yield process
    process.communicate()


def test_a_process_counts_with_its_descendants(holder):
    (child,) = descendants(holder.pid)
    own, both = resident(child), resident(holder.pid)
    assert 0.9 < own / (200 * MB) < 1.3  # an interpreter takes 10 to 20 MB
    assert 0.9 < both / (500 * MB) < 1.2
    assert holder.pid in descendants(subprocess.os.getpid())


def test_a_process_that_has_ended_takes_nothing():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert (resident(process.pid), descendants(process.pid)) == (0, [])


def test_the_meter_keeps_the_peak():
    return_freed_memory()
    with MemoryMeter(every=0.01) as meter:
        before = meter.sample()
        held = mmap.mmap(-1, 400 * MB)  # its pages return at once, whatever the allocator keeps
        held[:: mmap.PAGESIZE] = b"1" * -(-len(held) // mmap.PAGESIZE)
        time.sleep(0.1)
        held.close()
        after = meter.sample()
    assert meter.peak > before + 200 * MB  # half of it: other pages come and go meanwhile
    assert after < meter.peak - 200 * MB
