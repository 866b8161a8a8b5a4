"""Processes that end with the one that started them, however that one ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

_BEFORE = """
import contextlib, ctypes, os, signal, sys
with contextlib.suppress(AttributeError):
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit("its parent has ended")
os.execvp(sys.argv[2], sys.argv[2:])
"""
"""PR_SET_PDEATHSIG of Linux, which outlives exec; the parent may have ended before it was set."""


def dependent(command: Sequence[str]) -> list[str]:
    """Return a command line for a child of this process that is killed when this process ends.

    A child would otherwise continue after a SIGKILL of its parent: a service would keep its port
    and its memory, a training would write into folders that another one resumes.

    Args:
        command: Program and its arguments. The thread that starts it counts as its parent.
            Elsewhere than on Linux it runs as it is.
    """
    return [sys.executable, "-S", "-E", "-c", _BEFORE, str(os.getpid()), *command]
