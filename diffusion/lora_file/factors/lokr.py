"""LoKr: the Kronecker product of two matrices, each whole or factored (LyCORIS; Yeh et al., 2024).

With W₁ = B₁A₁ and W₂ = B₂A₂ it is (B₁ ⊗ B₂)(A₁ ⊗ A₂); a whole matrix is a factor of itself and of
the identity on its shorter side.
"""

import torch
from torch import Tensor

from diffusion.lora_file.factors.kind import Kind, Pair, Stored, matrix

_FIRST = ({"k1"}, {"k1_a", "k1_b"})
_SECOND = ({"k2"}, {"k2_a", "k2_b"}, {"k2_t", "k2_a", "k2_b"})


def _build(stored: Stored) -> Pair:
    first, second = _half(stored, "k1"), _half(stored, "k2")
    return Pair(torch.kron(first.down, second.down), torch.kron(first.up, second.up))


def _half(stored: Stored, name: str) -> Pair:
    if name in stored:
        return whole(matrix(stored[name]))
    a, b = matrix(stored[f"{name}_a"]), matrix(stored[f"{name}_b"])
    if f"{name}_t" in stored:  # Tucker: a is (r, out_features)
        return Pair(matrix(stored[f"{name}_t"]) @ b, a.T)
    if a.shape[1] != b.shape[0]:
        raise ValueError(f"factors of ranks {a.shape[1]} and {b.shape[0]} do not fit each other")
    return Pair(b, a)


def whole(weight: Tensor) -> Pair:
    """Return a matrix as the factors weight · I or I · weight, whichever rank is smaller."""
    outputs, inputs = weight.shape
    identity = torch.eye(min(outputs, inputs), dtype=weight.dtype, device=weight.device)
    return Pair(identity, weight) if inputs <= outputs else Pair(weight, identity)


def _rank(stored: Stored) -> int | None:
    """Return the rank of the factored matrix, the second one if both are; None if none is."""
    for name in ("k2_b", "k1_b"):
        if name in stored:
            return stored[name].shape[0]
    return None


LOKR = Kind("lokr", [frozenset(a | b) for a in _FIRST for b in _SECOND], _build, _rank)
