"""Adapters whose ΔW is like that of another one, compared without forming ΔW.

⟨s₁B₁A₁, s₂B₂A₂⟩ = s₁s₂ Σ (B₁ᵀB₂) ∘ (A₁A₂ᵀ), of r₁ × r₂ numbers a layer. The inner product of two
adapters is the sum over the layers of both; a layer that one of them lacks adds nothing to it, but
to the norm of the other. DoRA counts by its direction.
"""

import heapq
import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch

from diffusion.library.paths import LibraryError
from diffusion.library.record import Candidate
from diffusion.lora_file import Factors, LoraBundle, LoraFileError

NEAR = 0.98  # cosine from which two adapters count as near-duplicates

_HELD = 2**27
"""Numbers of factors that are held in memory; those of a larger adapter are read each time."""
_ROUNDING = 1e-9  # of cosines in float64


class Likeness(NamedTuple):
    """How an adapter compares with another one.

    Attributes:
        id: Of the adapter.
        cosine: Of both ΔW.
        shared: Layers that both change.
    """

    id: int
    cosine: float
    shared: int


def inner(one: Factors, two: Factors) -> float:
    """Return ⟨ΔW₁, ΔW₂⟩ (Frobenius) of the changes of one layer, in float64."""
    outputs = one.up.double().T @ two.up.double()
    inputs = one.down.double() @ two.down.double().T
    return one.scale * two.scale * float(torch.sum(outputs * inputs))


class Subject:
    """An adapter that others are compared with.

    Args:
        bundle: The adapter.

    Raises:
        LibraryError: Its change is zero or not finite.
    """

    def __init__(self, bundle: LoraBundle) -> None:
        self.family = bundle.family
        self.sizes = bundle.sizes()
        self.norms = bundle.norms()
        self.norm = math.sqrt(math.fsum(norm**2 for norm in self.norms.values()))
        if not 0 < self.norm < math.inf:
            raise LibraryError(
                f"the change of the adapter has the norm {self.norm}: there is nothing like it"
            )
        numbers = sum(s.rank * (s.in_features + s.out_features) for s in self.sizes.values())
        self._modules: Mapping[str, Factors] = bundle.modules
        if numbers <= _HELD:
            self._modules = dict(bundle.modules)

    def bound(self, other: Candidate) -> float:
        """Return what the cosine cannot exceed (Cauchy and Schwarz, layer by layer)."""
        shared = math.fsum(norm * other.norms.get(name, 0.0) for name, norm in self.norms.items())
        return shared / (self.norm * other.norm)

    def fits(self, other: LoraBundle) -> bool:
        """Return whether the layers of both have the same sizes, as in models of one size."""
        theirs = other.sizes()
        return all(theirs[n][1:] == size[1:] for n, size in self.sizes.items() if n in theirs)

    def inner(self, other: LoraBundle) -> float:
        """Return ⟨ΔW₁, ΔW₂⟩ over all layers."""
        shared = [name for name in self._modules if name in other.modules]
        return math.fsum(inner(self._modules[name], other.modules[name]) for name in shared)


def nearest(
    subject: Subject,
    candidates: Iterable[Candidate],
    k: int,
    load: Callable[[Candidate], LoraBundle],
    done: Callable[[int], object],
) -> tuple[list[Likeness], int, int]:
    """Return the k adapters of the largest cosine, exactly; files are read one at a time.

    Those whose bound is below the k-th cosine so far are not read.

    Args:
        subject: What they are compared with.
        candidates: Of the same family.
        k: Adapters wanted.
        load: Reads one; its LibraryError or LoraFileError skips it.
        done: Called with the number of candidates that are decided.

    Returns:
        What was found, the best first and the lowest id among equals; how many are for models of
        another size; how many could not be read.
    """
    bounds = [(subject.bound(one), one) for one in candidates]
    bounds.sort(key=lambda pair: (-pair[0], pair[1].id))
    best: list[tuple[float, int, int]] = []
    known: dict[str, tuple[float, int] | None] = {}
    others = unread = 0
    for number, (bound, one) in enumerate(bounds, 1):
        if len(best) == k and bound < best[0][0] - _ROUNDING:
            done(len(bounds))
            break
        if one.digest not in known:
            try:
                known[one.digest] = _compare(subject, one, load(one))
            except (LibraryError, LoraFileError):
                unread += 1
                done(number)
                continue
        if (found := known[one.digest]) is None:
            others += 1
        else:
            entry = (found[0], -one.id, found[1])
            (heapq.heappush if len(best) < k else heapq.heappushpop)(best, entry)
        done(number)
    return [Likeness(-negative, c, n) for c, negative, n in sorted(best)[::-1]], others, unread


def _compare(subject: Subject, one: Candidate, bundle: LoraBundle) -> tuple[float, int] | None:
    """Return cosine and number of shared layers; None for models of another size."""
    if not subject.fits(bundle):
        return None
    cosine = subject.inner(bundle) / (subject.norm * one.norm)
    shared = sum(name in bundle.modules for name in subject.norms)
    return min(1.0, max(-1.0, cosine)), shared
