"""Large buffers on huge pages.

Linux hands out memory in pages of 4 KiB when they are first written, which costs more than a
hundredth of the time of an expert layer for each of its large buffers and a tenth for the gradients
of 64 experts. Huge pages of 2 MiB, for which a process has to ask, cost a quarter of that.
"""

import ctypes
import functools
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_SMALL_PAGE = 4096
_HUGE_PAGE = 2**21
_ADVICE = 14  # MADV_HUGEPAGE


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """Return an uninitialized contiguous tensor in dtype and device of ``like``."""
    out = torch.empty(shape, dtype=like.dtype, device=like.device)
    size = out.numel() * out.element_size()
    if size < 2 * _HUGE_PAGE or out.device.type != "cpu" or (advise := _madvise()) is None:
        return out
    begin = -(-out.data_ptr() // _SMALL_PAGE) * _SMALL_PAGE
    advise(begin, (out.data_ptr() + size - begin) // _SMALL_PAGE * _SMALL_PAGE, _ADVICE)
    return out  # a refused advice changes nothing


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    function: Callable[[int, int, int], int] | None = getattr(ctypes.CDLL(None), "madvise", None)
    if function is not None:
        function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)  # type: ignore[attr-defined]
    return function
