import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.runs.dependent import dependent

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
        "import subprocess, sys, time; from harness.runs.dependent import dependent; "
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


@linux
def test_a_child_started_plainly_stays():
    """What the test above would miss if parents took all their children with them."""
    parent, pid = parent_of(f"[sys.executable, '-c', {WAIT!r}]")
    parent.kill()
    parent.communicate()
    try:
        assert not ended(pid, 0.5)
    finally:
        subprocess.os.kill(pid, signal.SIGKILL)


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
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr == "its parent has ended\n"
