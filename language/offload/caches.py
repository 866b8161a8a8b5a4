"""Which expert of a layer leaves when another needs its slot: LRU to ARC, and Belady's bound."""

from abc import ABC, abstractmethod
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import NamedTuple

from core_gates.errors import GatesError, check_option
from language.offload.guesses import Profile

Rank = Callable[["RankedCache", int], tuple[float, ...]]


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

    def __init__(self, capacity: int, trace: Sequence[int]) -> None:
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
        if evicted is not None:
            self.drop(evicted)
        self.resident.add(expert)
        return Use(hit, evicted)

    def drop(self, expert: int) -> None:
        """Forget an expert that is there: another one takes its slot, or it could not be read."""
        self.resident.remove(expert)

    @abstractmethod
    def _admit(self, expert: int, keep: Collection[int]) -> int | None: ...


class RankedCache(ExpertCache):
    """Evicts the expert of the lowest rank. Uses of experts that left still count.

    Args:
        capacity: See `ExpertCache`.
        trace: See `ExpertCache`.
        rank: Returns the rank of an expert that is there, by the attributes of this class.

    Attributes:
        clock: Uses up to now.
        entered: Of each expert, the use at which it last came; those that left are in it, too.
        last: The last use of each.
        count: Uses of each.
        profile: Uses of each in the trace.
    """

    def __init__(self, capacity: int, trace: Sequence[int], rank: Rank) -> None:
        super().__init__(capacity, trace)
        self.clock, self.rank = 0, rank
        self.entered: dict[int, int] = {}
        self.last: dict[int, int] = {}
        self.count: Counter[int] = Counter()
        self.profile = Counter(trace)

    def _admit(self, expert: int, keep: Collection[int]) -> int | None:
        evicted = None
        if expert not in self.resident:
            if len(self.resident) == self.capacity:
                evicted = min(self.resident.difference(keep), key=partial(self.rank, self))
            self.entered[expert] = self.clock
        self.clock += 1
        self.last[expert] = self.clock
        self.count[expert] += 1
        return evicted


class Belady(RankedCache):
    """The one that is used again last leaves: no policy hits more often. Needs the future."""

    def __init__(self, capacity: int, trace: Sequence[int]) -> None:
        never = float("inf")
        super().__init__(capacity, trace, lambda _, e: (-next(iter(self.times[e]), never),))
        self.times: defaultdict[int, deque[int]] = defaultdict(deque)  # uses that are to come
        for time, expert in enumerate(trace):
            self.times[expert].append(time)

    def _admit(self, expert: int, keep: Collection[int]) -> int | None:
        if next(iter(self.times[expert]), None) != self.clock:
            raise GatesError(
                f"use {self.clock} is of expert {expert}, which the trace of belady does not have"
                " there: replay the trace itself"
            )
        self.times[expert].popleft()
        return super()._admit(expert, keep)


class Slru(RankedCache):
    """Two segments: who is used again is protected, the rest leaves first.

    At most 4/5 of the slots are protected; beyond, the least recently used returns to the others
    as their newest.
    """

    def __init__(self, capacity: int, trace: Sequence[int]) -> None:
        self.protected: OrderedDict[int, None] = OrderedDict()
        super().__init__(capacity, trace, lambda c, e: (e in self.protected, c.last[e]))

    def drop(self, expert: int) -> None:
        """See `ExpertCache.drop`."""
        super().drop(expert)
        self.protected.pop(expert, None)

    def _admit(self, expert: int, keep: Collection[int]) -> int | None:
        evicted = super()._admit(expert, keep)
        if expert in self.resident:
            self.protected[expert] = None
            self.protected.move_to_end(expert)
            if len(self.protected) > self.capacity * 4 // 5:
                returned, _ = self.protected.popitem(last=False)
                self.last[returned] = self.clock
        return evicted


class Arc(ExpertCache):
    """Adaptive replacement: a list of what was used once, a list of what was used again.

    Experts that left either list are remembered; when one returns, its list is given more room
    (Megiddo and Modha, FAST 2003). All lists have the least recently used first.
    """

    def __init__(self, capacity: int, trace: Sequence[int]) -> None:
        super().__init__(capacity, trace)
        self.once, self.again, self.left_once, self.left_again = (
            OrderedDict[int, None]() for _ in range(4)
        )
        self.target = 0.0

    def drop(self, expert: int) -> None:
        """See `ExpertCache.drop`."""
        super().drop(expert)
        self._forget(expert)

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


POLICIES: dict[str, Callable[[int, Sequence[int]], ExpertCache]] = {
    # The least recently used leaves.
    "lru": partial(RankedCache, rank=lambda c, e: (c.last[e],)),
    "slru": Slru,
    # The least frequently used; of equals, the least recently used.
    "lfu": partial(RankedCache, rank=lambda c, e: (c.count[e], c.last[e])),
    # The lowest number of uses per access since the last use: frequency and recency together.
    "lfru": partial(
        RankedCache, rank=lambda c, e: (c.count[e] / (c.clock + 1 - c.last[e]), c.last[e])
    ),
    # The newest leaves, as in an ablation of Pre-gated MoE (arXiv 2308.12066).
    "lifo": partial(RankedCache, rank=lambda c, e: (-c.entered[e],)),
    "arc": Arc,
    # The least used in a profile leaves: the hottest stay, one slot serves all others.
    "static": partial(RankedCache, rank=lambda c, e: (c.profile[e], c.last[e])),
    "belady": Belady,
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


def make_caches(policy: str, slots: Sequence[int], profile: Profile | None) -> list[ExpertCache]:
    """Return an empty cache for each layer.

    Args:
        policy: Which expert leaves.
        slots: Capacity of each.
        profile: What ``static`` counts.

    Raises:
        GatesError: See `make_cache`.
    """
    used: list[list[int]] = [[]] * len(slots)
    if profile is not None and policy in FROM_TRACE:
        used = profile.routed.flatten(1).tolist()
    return [make_cache(policy, *one) for one in zip(slots, used, strict=True)]
