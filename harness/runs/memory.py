"""Keeping the memory that is freed, instead of returning it to the system."""

import ctypes
import os
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # names of mallopt(3)
TOP_PAD = 64 * 2**20  # bytes taken from the system at once


def keep_freed_memory() -> bool:
    """Tell the malloc of glibc to keep freed memory, and return whether it took that.

    Large tensors are otherwise mapped and unmapped by every operation, and getting their pages
    again costs more than the work of many operations. Nothing happens where there is no glibc, or
    where the environment has a variable ``MALLOC_...`` already.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: TOP_PAD}
    return all(mallopt(name, value) == 1 for name, value in settings.items())


def return_freed_memory() -> bool:
    """Return unused pages to the system, and return whether any were; for rare, large releases."""
    if sys.platform != "linux":
        return False
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return bool(trim is not None and trim(0))
