"""Which expert of a layer leaves when another needs its slot: LRU to ARC, and Belady's bound."""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from core_gates.errors import GatesError, check_option


class Use(NamedTuple):
    """What one use of an expert did.

    Attributes:
        hit: Whether the expert was there.
        evicted: The expert whose slot it took, None if a slot was free or it was a hit.
    """

    hit: bool
    evicted: int | None


class ExpertCache(ABC):
    """The experts of one layer that are in memory, and the order in which they leave.

    Args:
        capacity: Experts that there is room for, at least 1.
        trace: Experts of the layer in order of use: what ``static`` counts, and the future that
            ``belady`` knows. The other policies ignore it.

    Attributes:
        resident: Experts that are there.
    """

    def __init__(self, capacity: int, trace: Sequence[int] = ()) -> None:
        self.capacity, self.trace = capacity, trace
        self.resident: set[int] = set()

    def use(self, expert: int, keep: Collection[int] = ()) -> Use:
        """Count a use of ``expert`` and make room for it if it is not there.

        Args:
            expert: Index of the expert.
            keep: Experts that must not leave now; with ``expert`` at most ``capacity``.
        """
        hit = expert in self.resident
        evicted = self._admit(expert, keep)
        self.resident = (self.resident - {evicted}) | {expert}
        return Use(hit, evicted)

    def drop(self, expert: int) -> None:
        """Forget an expert that is there: it could not be read."""
        self._forget(expert)
        self.resident.remove(expert)

    @abstractmethod
    def _admit(self, expert: int, keep: Collection[int]) -> int | None: ...

    @abstractmethod
    def _forget(self, expert: int) -> None: ...


class RankedCache(ExpertCache):
    """Evicts the expert of the lowest rank. Uses of experts that left still count."""

    def __init__(self, capacity: int, trace: Sequence[int] = ()) -> None:
        super().__init__(capacity, trace)
        self.clock = 0
        self.entered: dict[int, int] = {}
        self.last: dict[int, int] = {}
        self.count: Counter[int] = Counter()

    @abstractmethod
    def _rank(self, expert: int) -> tuple[float, ...]: ...

    def _admit(self, expert: int, keep: Collection[int]) -> int | None:
        evicted = None
        if expert not in self.resident and len(self.resident) == self.capacity:
            evicted = min(self.resident.difference(keep), key=self._rank)
            self._forget(evicted)
        self.clock += 1
        self.entered.setdefault(expert, self.clock)
        self.last[expert] = self.clock
        self.count[expert] += 1
        return evicted

    def _forget(self, expert: int) -> None:
        del self.entered[expert]


class Lru(RankedCache):
    """Least recently used."""

    def _rank(self, expert: int) -> tuple[float, ...]:
        return (self.last[expert],)


class Lfu(RankedCache):
    """Least frequently used; of equals, the least recently used."""

    def _rank(self, expert: int) -> tuple[float, ...]:
        return self.count[expert], self.last[expert]


class Lfru(RankedCache):
    """Lowest number of uses per access since the last use: frequency and recency together."""

    def _rank(self, expert: int) -> tuple[float, ...]:
        last = self.last[expert]
        return self.count[expert] / (self.clock + 1 - last), last


class Lifo(RankedCache):
    """The newest leaves, as in an ablation of Pre-gated MoE (arXiv 2308.12066)."""

    def _rank(self, expert: int) -> tuple[float, ...]:
        return (-self.entered[expert],)


class Static(RankedCache):
    """The least used in a profile leaves: the hottest stay, one slot serves all others."""

    def __init__(self, capacity: int, trace: Sequence[int] = ()) -> None:
        super().__init__(capacity, trace)
        self.profile = Counter(trace)

    def _rank(self, expert: int) -> tuple[float, ...]:
        return self.profile[expert], self.last[expert]


class Belady(RankedCache):
    """The one that is used again last leaves: no policy hits more often. Needs the future."""

    def __init__(self, capacity: int, trace: Sequence[int] = ()) -> None:
        super().__init__(capacity, trace)
        self.future = list(trace)
        self.times: defaultdict[int, list[int]] = defaultdict(list)
        for time, expert in enumerate(trace):
            self.times[expert].append(time)

    def _admit(self, expert: int, keep: Collection[int]) -> int | None:
        if self.future[self.clock : self.clock + 1] != [expert]:
            raise GatesError(
                f"use {self.clock} is of expert {expert}, which the trace of belady does not have"
                " there: replay the trace itself"
            )
        return super()._admit(expert, keep)

    def _rank(self, expert: int) -> tuple[float, ...]:
        times = self.times[expert]
        place = bisect_right(times, self.clock)
        return (-times[place] if place < len(times) else float("-inf"),)


class Slru(RankedCache):
    """Two segments: who is used again is protected, the rest leaves first.

    At most 4/5 of the slots are protected; beyond, the least recently used returns to the others
    as their newest.
    """

    def __init__(self, capacity: int, trace: Sequence[int] = ()) -> None:
        super().__init__(capacity, trace)
        self.protected: OrderedDict[int, None] = OrderedDict()

    def _admit(self, expert: int, keep: Collection[int]) -> int | None:
        evicted = super()._admit(expert, keep)
        if expert in self.resident:
            self.protected[expert] = None
            self.protected.move_to_end(expert)
            if len(self.protected) > self.capacity * 4 // 5:
                returned, _ = self.protected.popitem(last=False)
                self.last[returned] = self.clock
        return evicted

    def _forget(self, expert: int) -> None:
        super()._forget(expert)
        self.protected.pop(expert, None)

    def _rank(self, expert: int) -> tuple[float, ...]:
        return expert in self.protected, self.last[expert]


class Arc(ExpertCache):
    """Adaptive replacement: a list of what was used once, a list of what was used again.

    Experts that left either list are remembered; when one returns, its list is given more room
    (Megiddo and Modha, FAST 2003). All lists have the least recently used first.
    """

    def __init__(self, capacity: int, trace: Sequence[int] = ()) -> None:
        super().__init__(capacity, trace)
        self.once, self.again = _ordered(), _ordered()
        self.left_once, self.left_again = _ordered(), _ordered()
        self.target = 0.0

    def _admit(self, expert: int, keep: Collection[int]) -> int | None:
        if expert in self.resident:
            self._forget(expert)
            self.again[expert] = None
            return None
        evicted = None
        b1, b2, full = self.left_once, self.left_again, self.capacity
        returned = expert in b1 or expert in b2
        if expert in b1:
            self.target = min(full, self.target + max(1.0, len(b2) / len(b1)))
        elif expert in b2:
            self.target = max(0.0, self.target - max(1.0, len(b1) / len(b2)))
        elif len(self.once) + len(b1) == full:
            if b1:
                b1.popitem(last=False)
        elif len(b1) + len(b2) + len(self.resident) >= 2 * full and b2:
            b2.popitem(last=False)
        if len(self.resident) == full:
            remember = returned or len(self.once) < full
            evicted = self._evict(expert in b2, keep, remember)
        b1.pop(expert, None)
        b2.pop(expert, None)
        (self.again if returned else self.once)[expert] = None
        return evicted

    def _forget(self, expert: int) -> None:
        self.once.pop(expert, None)
        self.again.pop(expert, None)

    def _evict(self, returned_again: bool, keep: Collection[int], remember: bool) -> int:
        size = len(self.once)
        from_once = size > 0 and (size > self.target or (returned_again and size == self.target))
        lists = [(self.once, self.left_once), (self.again, self.left_again)]
        for here, left in lists if from_once else lists[::-1]:
            for expert in here:
                if expert not in keep:
                    del here[expert]
                    if remember:
                        left[expert] = None
                    return expert
        raise AssertionError("more experts are kept than there is room for")


def _ordered() -> OrderedDict[int, None]:
    return OrderedDict()


POLICIES: dict[str, type[ExpertCache]] = {
    **{"lru": Lru, "slru": Slru, "lfu": Lfu, "lfru": Lfru, "lifo": Lifo, "arc": Arc},
    **{"static": Static, "belady": Belady},
}
FROM_TRACE = ("static", "belady")


def make_cache(policy: str, capacity: int, trace: Sequence[int] = ()) -> ExpertCache:
    """Return an empty cache of one layer.

    Raises:
        GatesError: ``policy`` is unknown, or it needs a trace and none is given.
    """
    check_option("policy", policy, POLICIES, GatesError)
    if policy in FROM_TRACE and not len(trace):
        raise GatesError(f"policy {policy!r} needs a trace of the layer: give one, or choose 'lfu'")
    return POLICIES[policy](capacity, trace)


def replay(cache: ExpertCache, trace: Iterable[int]) -> list[bool]:
    """Return for each use of a trace whether the expert was there."""
    return [cache.use(expert).hit for expert in trace]
