"""A lock is held by one process, goes with it, and leaves no file."""

import os
import signal
import time

import pytest

from core_gates.errors import GatesError
from harness.files.atomic import locked

pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)


def hold(path):
    """Hold a lock in a block that does nothing."""
    with locked(path, path.parent / "out", "choose another --output"):
        assert path.exists()


def forked(work):
    """Do some work in a process that is forked, and return its id."""
    if child := os.fork():
        return child
    code = 1
    try:
        code = work() or 0
    finally:
        os._exit(code)


def test_a_lock_is_held_by_one_process_and_leaves_no_file(refuses, tmp_path):
    lock = tmp_path / ".out.lock"

    def refused():
        refuses(GatesError, ("out: wait for it, or choose another --output", lambda: hold(lock)))

    with locked(lock, tmp_path / "out", "choose another --output"):
        assert os.waitstatus_to_exitcode(os.waitpid(forked(refused), 0)[1]) == 0
        refused()
        assert lock.exists()
    hold(lock)
    assert not lock.exists()


def test_who_waits_has_the_lock_afterwards(tmp_path):
    lock = tmp_path / ".out.lock"
    ready, written = os.pipe()

    def work():
        with locked(lock, tmp_path / "out", ""):
            os.write(written, b"1")
            time.sleep(0.3)
            (tmp_path / "out").touch()

    holder = forked(work)
    os.read(ready, 1)
    with locked(lock, tmp_path / "out", "", wait=True):
        assert (tmp_path / "out").exists()
    assert os.waitstatus_to_exitcode(os.waitpid(holder, 0)[1]) == 0
    assert not lock.exists()


def test_a_killed_process_lets_go_though_one_that_it_forked_lives_on(tmp_path):
    lock = tmp_path / ".out.lock"
    ready, written = os.pipe()

    def work():
        with locked(lock, tmp_path / "out", "choose another --output"):
            os.write(written, forked(lambda: time.sleep(20)).to_bytes(4, "big"))
            time.sleep(20)

    holder = forked(work)
    left_behind = int.from_bytes(os.read(ready, 4), "big")
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    hold(lock)
    os.kill(left_behind, signal.SIGKILL)


def test_the_next_one_is_not_refused_by_a_file_that_a_killed_process_left(tmp_path):
    (tmp_path / ".out.lock").touch()
    hold(tmp_path / ".out.lock")
    assert not list(tmp_path.iterdir())
