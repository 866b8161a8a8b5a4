"""Memory of the experts that are there: slabs that are allocated once."""

from collections.abc import Callable

import torch

from core_gates.errors import GatesError
from language.offload.expert_store import ALIGNMENT

Read = Callable[[memoryview], None]
PINNED = 2
"""Slabs of main memory that experts pass through on their way to a GPU."""


class SlabPool:
    """Slabs in main memory, each aligned to 64 bytes.

    Args:
        slots: Number of slabs.
        slab_bytes: Size of each, a multiple of 64.

    Attributes:
        slabs: Bytes (slots, slab_bytes).
    """

    def __init__(self, slots: int, slab_bytes: int) -> None:
        raw = torch.empty(slots * slab_bytes + ALIGNMENT, dtype=torch.uint8)
        start = -raw.data_ptr() % ALIGNMENT
        self.slabs = raw[start : start + slots * slab_bytes].view(slots, slab_bytes)
        self._buffers = [slab.numpy().data for slab in self.slabs]

    def fill(self, slot: int, read: Read) -> None:
        """Fill a slab by ``read``; the thread of transfers calls it."""
        read(self._buffers[slot])

    def enter(self, slot: int) -> None:
        """Let what the caller computes from now on see the slab."""

    def leave(self, slot: int) -> None:
        """Let the slab be overwritten after what the caller computed up to now."""


class CudaPool(SlabPool):
    """Slabs on a GPU, filled by a stream of copies from two pinned slabs, an event for each slot.

    No CUDA device has run this class yet.
    """

    def __init__(self, slots: int, slab_bytes: int, device: torch.device) -> None:
        self.slabs = torch.empty(slots, slab_bytes, dtype=torch.uint8, device=device)
        self._pinned = torch.empty(PINNED, slab_bytes, dtype=torch.uint8, pin_memory=True)
        self._copied = [torch.cuda.Event() for _ in self._pinned]
        self._stream = torch.cuda.Stream(device)
        self._arrived = [torch.cuda.Event() for _ in range(slots)]
        self._left = [torch.cuda.Event() for _ in range(slots)]
        self._turn = 0

    def fill(self, slot: int, read: Read) -> None:
        """Read into a pinned slab and begin the copy; it waits for what still uses the slot."""
        self._turn = 1 - self._turn
        pinned, copied = self._pinned[self._turn], self._copied[self._turn]
        copied.synchronize()
        read(pinned.numpy().data)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._left[slot])
            self.slabs[slot].copy_(pinned, non_blocking=True)
            copied.record(self._stream)
            self._arrived[slot].record(self._stream)

    def enter(self, slot: int) -> None:
        """Let the current stream wait for the copy."""
        torch.cuda.current_stream(self.slabs.device).wait_event(self._arrived[slot])

    def leave(self, slot: int) -> None:
        """Let the next copy into the slot wait for the current stream."""
        self._left[slot].record(torch.cuda.current_stream(self.slabs.device))


def device_of(name: torch.device | str) -> torch.device:
    """Return a device.

    Raises:
        GatesError: There is none of that name or no GPU, or experts do not run there.
    """
    try:
        found = torch.device(name)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda", "meta"):
        raise GatesError(f"device is {str(name)!r}, expected 'cpu' or 'cuda'")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise GatesError(f"PyTorch finds no GPU here: give device='cpu' instead of {found}")
    return found
