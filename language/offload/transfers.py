"""One thread that reads experts into slabs, the most urgent first."""

import itertools
import weakref
from concurrent import futures
from functools import partial
from queue import PriorityQueue
from threading import Thread

from core_gates.errors import GatesError
from language.offload.expert_store import ExpertStore
from language.offload.pool import SlabPool

STOP, DEMAND, AHEAD, GUESS = -1, 0, 1, 2
"""Priorities: end of the thread, what is waited for, what is needed soon, what may be needed."""


class Transfer(futures.Future[None]):
    """One expert on its way into a slot; done when the slab is filled, or when that failed.

    Attributes:
        name: Of the expert, for errors.
        guessed: Whether it was queued because it may be needed.
    """

    def __init__(
        self, layer: int, expert: int, slot: int, name: str, *, guessed: bool = False
    ) -> None:
        super().__init__()
        self.layer, self.expert, self.slot, self.name = layer, expert, slot, name
        self.guessed = guessed

    @property
    def filled(self) -> bool:
        """Whether the expert is in its slab."""
        return self.done() and not self.cancelled() and self.exception() is None


Queue = PriorityQueue[tuple[int, int, Transfer | None]]


class Transfers:
    """The thread, and the queue before it. It ends with `close`, or with this object.

    Args:
        store: Where experts are read from.
        pool: Where they are put.
        patience: Seconds after which a read that is waited for counts as stalled.
    """

    def __init__(self, store: ExpertStore, pool: SlabPool, patience: float) -> None:
        self.patience = patience
        self._queue: Queue = PriorityQueue()
        self._order = itertools.count()
        self._reading: list[Transfer] = []  # what the thread is at
        serve = partial(_serve, self._queue, self._reading, store, pool)
        self.thread = Thread(target=serve, name="experts", daemon=True)
        self.thread.start()
        self._stop = weakref.finalize(self, self._queue.put, (STOP, 0, None))

    def request(self, transfer: Transfer) -> None:
        """Queue the transfer of an expert that is, or may be, needed soon."""
        self._queue.put((GUESS if transfer.guessed else AHEAD, next(self._order), transfer))

    def wait(self, transfer: Transfer) -> None:
        """Wait until the slab is filled.

        Raises:
            GatesError: The expert cannot be read, or what `settle` raises.
        """
        self.settle(transfer)
        if error := transfer.exception():
            raise GatesError(f"{transfer.name} cannot be read: {error}") from error

    def settle(self, transfer: Transfer) -> None:
        """Wait until the transfer has ended; it overtakes those that are not waited for.

        Raises:
            GatesError: It has not ended in ``patience`` seconds; the error names the expert that
                the thread is at.
        """
        if transfer.done():
            return
        if not self.thread.is_alive():
            raise GatesError(f"{transfer.name} is in a closed store: load the model again")
        self._queue.put((DEMAND, next(self._order), transfer))
        if not futures.wait([transfer], self.patience).done:
            stalled = next(iter(self._reading.copy()), transfer)
            raise GatesError(
                f"{stalled.name} has not arrived in {self.patience:g} seconds: check the disk, or"
                " give more patience"
            )

    def close(self) -> None:
        """End the thread, after the read that it is at."""
        self._stop()
        self.thread.join(self.patience)


def _serve(queue: Queue, reading: list[Transfer], store: ExpertStore, pool: SlabPool) -> None:
    while (transfer := queue.get()[2]) is not None:
        if transfer.done() or not transfer.set_running_or_notify_cancel():
            continue  # cancelled, or read already when it was queued a second time
        reading[:] = [transfer]
        try:
            pool.fill(transfer.slot, partial(store.read_into, transfer.layer, transfer.expert))
            transfer.set_result(None)
        except BaseException as error:
            transfer.set_exception(error)
