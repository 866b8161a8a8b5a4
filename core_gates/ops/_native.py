"""C++ kernels of the CPU: compiled by the system's compiler at their first call, then kept.

A kernel is plain C++17 that works on rows: its functions take pointers and sizes, of which the last
two are the first row and the row after the last one, so that threads can share the rows.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core_gates.errors import GatesError

CACHE_VARIABLE = "CORE_GATES_CACHE"
FLAGS = (
    *("-O3", "-std=c++17", "-shared", "-fPIC"),
    *("-fno-math-errno", "-ffp-contract=fast", "-fopenmp-simd"),
)
COMPILERS = ("c++", "g++", "clang++")


def compiler() -> list[str]:
    """Return the command of the C++ compiler: ``CXX``, or the first one that is found.

    Raises:
        GatesError: There is none.
    """
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [[name] for name in COMPILERS]:
        path = shutil.which(command[0])
        if path is not None:
            return [path, *command[1:]]
    wanted = named[0] if named else " or ".join(COMPILERS)
    raise GatesError(
        f"kernels('cpp') needs a C++ compiler, found no {wanted}: install g++ or clang, or name one"
        " in CXX"
    )


@functools.cache
def library(source: Path) -> ctypes.CDLL:
    """Compile a source for this processor, unless that has been done before, and load it.

    Libraries are kept in ``CORE_GATES_CACHE``, or in ``gatesuite`` of the user's cache folder.

    Raises:
        GatesError: There is no compiler, it fails, or the folder cannot be used.
    """
    try:
        path = _cache_folder() / f"{source.parent.name}-{_key(source)}.so"
        if not path.is_file():
            _build(source, path)
        _refuse_foreign(path)
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # damaged, or of another system
            _build(source, path)
            return ctypes.CDLL(str(path))
    except (OSError, RuntimeError) as error:
        raise GatesError(
            f"kernels('cpp') cannot keep what it compiles: {error}; name a folder that you may"
            f" write in {CACHE_VARIABLE}"
        ) from None


def _key(source: Path) -> str:
    """Return what distinguishes libraries; a home may be shared by processors of many kinds."""
    flags = b""
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
        flags = next((line for line in lines if line.startswith((b"flags", b"Features"))), b"")
    named = os.environ.get("CXX", "")
    headers = sorted(source.parent.parent.glob("*.h"))
    facts = [
        *(file.read_bytes() for file in (source, *headers)),
        repr((FLAGS, platform.machine(), named)).encode(),
        flags,
    ]
    return hashlib.sha256(b"\0".join(facts)).hexdigest()[:16]


def _cache_folder() -> Path:
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache").absolute() / "gatesuite"


def _refuse_foreign(path: Path) -> None:
    """Refuse to run what another user may have written."""
    if not hasattr(os, "getuid"):
        return
    for place in (path.parent, path):
        status = place.stat()
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise GatesError(
                f"others may write to {place}, which kernels('cpp') would run: chmod go-w it, or"
                f" name your own folder in {CACHE_VARIABLE}"
            )


def _build(source: Path, path: Path) -> None:
    command = compiler()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        ends = (str(source), "-o", str(built))
        done = _call([*command, *FLAGS, "-march=native", *ends])
        if done.returncode:  # not every compiler knows the processor that it runs on
            done = _call([*command, *FLAGS, *ends])
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            reason = next((line for line in lines if "error" in line), lines[-1])
            raise GatesError(
                f"{command[0]} could not compile {source.name} of {source.parent.name}: {reason};"
                " use kernels('reference')"
            )
        built.chmod(0o700)
        built.replace(path)


def _call(command: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        env=os.environ | {"LC_ALL": "C"},
        check=False,
    )


def run_rows(function: Any, arguments: Sequence[object], num_rows: int, chunk: int) -> None:
    """Call ``function(*arguments, start, end)`` for chunks of rows, on the threads of torch.

    Args:
        function: Function of a library.
        arguments: Contiguous float32 and int64 tensors of the CPU, integers and floats.
        num_rows: Number of rows.
        chunk: Rows of a call; results may depend on it, but not on the number of threads.

    Raises:
        TypeError: A tensor is of another kind.
    """
    fixed = [_argument(argument) for argument in arguments]
    starts = range(0, num_rows, chunk)

    def call(start: int) -> None:
        end = min(start + chunk, num_rows)
        function(*fixed, ctypes.c_int64(start), ctypes.c_int64(end))

    threads = min(torch.get_num_threads(), len(starts))
    if threads <= 1:
        for start in starts:
            call(start)
        return
    waiting = [_pool(threads).submit(call, start) for start in starts]
    try:
        for future in waiting:
            future.result()
    finally:  # whatever interrupts: nothing may write to tensors that are given up
        for future in waiting:
            future.cancel()
        wait(waiting)


def _argument(value: object) -> Any:
    if isinstance(value, Tensor):
        supported = value.dtype in (torch.float32, torch.int64) and value.is_cpu
        if not supported or not value.is_contiguous() or (value.numel() and not value.data_ptr()):
            raise TypeError(
                f"a C++ kernel needs contiguous float32 or int64 of the CPU, got {value.dtype} on"
                f" {value.device} with strides {value.stride()}"
            )
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, int):
        return ctypes.c_int64(value)
    assert isinstance(value, float)
    return ctypes.c_float(value)


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="core_gates")


if hasattr(os, "register_at_fork"):  # a child has no threads but the one that forked
    os.register_at_fork(after_in_child=_pool.cache_clear)


LEAST_WORK = 2**20
"""Multiplications of a product below which the overhead of oneDNN shows."""

_ops: Any = torch.ops


@functools.cache
def is_faster() -> bool:
    """Return whether oneDNN is the faster library on this processor."""
    libraries: Any = torch.backends
    if not (libraries.mkl.is_available() and libraries.mkldnn.is_available()):
        return False
    if not hasattr(_ops.mkldnn, "_linear_pointwise") or not Path("/proc/cpuinfo").is_file():
        return False
    facts = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    return "avx512f" in facts and "GenuineIntel" not in facts


def product(left: Tensor, right: Tensor, bias: Tensor | None = None, *, cpp: bool) -> Tensor:
    """Return the product (N, M) of matrices (N, K) and (K, M), of any strides.

    Args:
        left: First factor, float32 on the CPU.
        right: Second factor.
        bias: Added to every row (M,).
        cpp: Whether the op runs in the C++ mode.
    """
    if cpp and _pays(left, right):
        if not (right.is_contiguous() or right.mT.is_contiguous()):
            right = right.contiguous()  # for rows with gaps oneDNN has a slow loop alone
        result: Tensor = _ops.mkldnn._linear_pointwise(left, right.mT, bias, "none", [], "")
        return result
    return left @ right if bias is None else torch.addmm(bias, left, right)


def products(
    left: Tensor, right: Tensor, out: Tensor, bias: Tensor | None = None, *, cpp: bool
) -> None:
    """Write the products (E, N, M) of stacked matrices (E, N, K) and (E, K, M).

    Args:
        left: First factors.
        right: Second factors.
        out: Where the products go.
        bias: Added to every row of a product (E, M).
        cpp: Whether the op runs in the C++ mode.
    """
    if cpp and _pays(left[0], right[0]):
        biases: Sequence[Tensor | None] = [None] * len(out) if bias is None else list(bias)
        for factor, other, summand, result in zip(left, right, biases, out, strict=True):
            result.copy_(product(factor, other, summand, cpp=True))
    elif bias is None:
        torch.bmm(left, right, out=out)
    else:
        torch.baddbmm(bias.unsqueeze(1), left, right, out=out)


def add_products(out: Tensor, left: Tensor, right: Tensor, *, cpp: bool) -> None:
    """Add products of matrices, or of stacked ones, to ``out`` (N, M) or (E, N, M)."""
    if out.ndim == 3 and cpp and _pays(left[0], right[0]):
        for result, factor, other in zip(out, left, right, strict=True):
            result.add_(product(factor, other, cpp=True))
    elif out.ndim == 3:
        out.baddbmm_(left, right)
    elif cpp and _pays(left, right):
        out.add_(product(left, right, cpp=True))
    else:
        out.addmm_(left, right)


def _pays(left: Tensor, right: Tensor) -> bool:
    """Return whether oneDNN is faster for a product: not if it is small or has few rows."""
    rows = left.shape[0]
    work = rows * right.shape[0] * right.shape[1]
    return work >= LEAST_WORK and rows * work >= 128 * LEAST_WORK and is_faster()
