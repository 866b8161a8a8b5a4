"""The forward pass of ``gated_lora`` in C++ for float32 on the CPU."""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from core_gates.ops._native import library, run_rows
from core_gates.ops.gated_lora import reference

SOURCE = Path(__file__).with_name("kernel.cpp")
CHUNK = 16
"""Tokens of a chunk, for which a block of features of all adapters stays in the cache."""

FEATURES = 64
"""The number of features must be a multiple of this one."""


def possible(base: Tensor) -> bool:
    """Return whether the kernel takes this number of features."""
    return base.shape[-1] % FEATURES == 0


def forward(
    base: Tensor,
    hidden: Tensor,
    up: Tensor,
    coefficients: Tensor,
    ranks: Sequence[int],
    eps: float,
    out: Tensor,
) -> Tensor:
    """Write what ``reference.forward`` returns into ``out`` (``base`` itself, too) and return it.

    Logits are clamped to ±40: a gate is never further than 4e-18 from what it would be.
    """
    mean, rstd = reference.statistics(hidden, up, ranks, eps)
    ends = torch.tensor(list(accumulate(ranks)), dtype=torch.int64, device="cpu")
    packed = up.view(len(up), -1, FEATURES).transpose(0, 1)
    inputs = [t.contiguous() for t in (base, hidden, mean, rstd, packed, coefficients)]
    target = out if out.is_contiguous() else out.contiguous()
    arguments = [*inputs, ends, target, len(ranks), base.shape[1], float(eps)]
    run_rows(library(SOURCE).mix, arguments, len(base), CHUNK)
    return out if target is out else out.copy_(target)
