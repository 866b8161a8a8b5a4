"""The worst of many comparisons."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Check(NamedTuple):
    """The worst of what was compared under one name.

    Attributes:
        value: The largest error, or a count; infinite where a number was not finite or a shape
            differed.
        n: What was compared.
        at: Which of it was worst.
    """

    value: float
    n: int = 1
    at: str = ""


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest deviation over the largest expected magnitude.

    It is infinite where shapes differ or a number is not finite, and where zeros are expected but
    not found.
    """
    if found.shape != expected.shape:
        return math.inf
    found, expected = found.detach().double(), expected.detach().double()
    if not (found.isfinite().all() and expected.isfinite().all()):
        return math.inf
    if not expected.numel():
        return 0.0
    error, scale = float((found - expected).abs().max()), float(expected.abs().max())
    return 0.0 if error == 0 else error / scale if scale else math.inf


def worst(errors: Iterable[tuple[str, float]]) -> Check:
    """Return the worst of named errors; there must be some, and NaN is the worst of all."""
    named = {name: math.inf if math.isnan(error) else error for name, error in errors}
    if not named:
        return Check(math.inf, 0, "nothing was compared")
    at = max(named, key=lambda name: named[name])
    return Check(named[at], len(named), at)


def bits_changed(found: Tensor, expected: Tensor) -> int:
    """Return how many numbers of two tensors differ in a bit, all where shapes or types do."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return max(found.numel(), expected.numel(), 1)
    one, other = (t.detach().contiguous().view(-1, 1).view(torch.uint8) for t in (found, expected))
    return int((one != other).any(1).sum())
