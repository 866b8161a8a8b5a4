"""Matrices in 8 bits: rows of integers with a scale each."""

from collections.abc import Mapping

import torch
from torch import Tensor

NORMALIZATION = ("norm", "running_")
"""Parts of names of what belongs to a normalization."""

SCALES = " scales"
"""Suffix of the scales of a matrix that is stored in 8 bits."""


def in_8_bits(result: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return arrays with rows of 8-bit integers and a scale per row in place of matrices.

    A value is off by at most 1/254 of the largest of its row. Vectors and integers stay as they
    are, and so do the parameters and statistics of normalizations, where a small variance must not
    become 0; `from_8_bits` restores float32.
    """
    made: dict[str, Tensor] = {}
    for name, value in result.items():
        exact = any(word in name for word in NORMALIZATION)
        if value.ndim < 2 or exact or not value.is_floating_point():
            made[name] = value
            continue
        scales = value.float().abs().amax(-1).clamp(min=1e-12) / 127
        scales = scales.bfloat16()
        rows = (value.float() / scales.float().unsqueeze(-1)).round().clamp(-127, 127)
        made |= {name: rows.to(torch.int8), f"{name}{SCALES}": scales}
    return made


def from_8_bits(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return arrays with float32 in place of what `in_8_bits` has rounded."""
    return {
        name: value.float() * found[f"{name}{SCALES}"].float().unsqueeze(-1)
        if f"{name}{SCALES}" in found
        else value
        for name, value in found.items()
        if not name.endswith(SCALES)
    }
