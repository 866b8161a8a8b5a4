"""C++ kernels of the CPU: compiled by the system's compiler at their first call, then kept.

A kernel is plain C++17 that works on rows: its functions take pointers and sizes, of which the last
two are the first row and the row after the last one, so that threads can share the rows.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core_gates.errors import GatesError

CACHE_VARIABLE = "CORE_GATES_CACHE"
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno", "-ffp-contract=fast")
COMPILERS = ("c++", "g++", "clang++")


def compiler() -> str:
    """Return the path of the C++ compiler: ``CXX``, or the first one that is found.

    Raises:
        GatesError: There is none.
    """
    names = [os.environ["CXX"]] if os.environ.get("CXX") else COMPILERS
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        raise GatesError(
            f"kernels('cpp') needs a C++ compiler, found no {' or '.join(names)}: install g++ or"
            " clang, or name one in CXX"
        )
    return found


@functools.cache
def library(source: Path) -> ctypes.CDLL:
    """Compile a source for this processor, unless that has been done before, and load it.

    Libraries are kept in ``CORE_GATES_CACHE``, or in ``gatesuite`` of the user's cache folder.

    Raises:
        GatesError: There is no compiler, or it fails.
    """
    content = source.read_bytes()
    key = hashlib.sha256(b"\0".join([content, repr(FLAGS).encode(), _processor()])).hexdigest()
    path = _cache_folder() / f"{source.parent.name}-{key[:16]}.so"
    if not path.is_file():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            built = Path(folder) / path.name
            _compile(source, built)
            built.replace(path)
    return ctypes.CDLL(str(path))


def _compile(source: Path, target: Path) -> None:
    command = [compiler(), *FLAGS, "-march=native", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        reason = next((line for line in lines if "error" in line), "no message")
        raise GatesError(
            f"{command[0]} could not compile {source.name} of {source.parent.name}: {reason}; use"
            " kernels('reference')"
        )


def _cache_folder() -> Path:
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gatesuite"


def _processor() -> bytes:
    """Return what tells processors apart that need other code: a home may be shared by many."""
    flags = b""
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
        flags = next((line for line in lines if line.startswith((b"flags", b"Features"))), b"")
    return platform.machine().encode() + flags


def run_rows(function: Any, arguments: Sequence[object], num_rows: int, chunk: int) -> None:
    """Call ``function(*arguments, start, end)`` for chunks of rows, on the threads of torch.

    Args:
        function: Function of a library.
        arguments: Tensors, which must be contiguous, integers and floats.
        num_rows: Number of rows.
        chunk: Rows of a call; results may depend on it, but not on the number of threads.
    """
    fixed = [_argument(one) for one in arguments]
    starts = range(0, num_rows, chunk)

    def call(start: int) -> None:
        end = min(start + chunk, num_rows)
        function(*fixed, ctypes.c_int64(start), ctypes.c_int64(end))

    threads = min(torch.get_num_threads(), len(starts))
    if threads <= 1:
        for start in starts:
            call(start)
    else:
        list(_pool(threads).map(call, starts))


def _argument(value: object) -> Any:
    if isinstance(value, Tensor):
        assert value.is_contiguous()
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_int64(value) if isinstance(value, int) else ctypes.c_float(value)  # type: ignore[arg-type]


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="core_gates")
