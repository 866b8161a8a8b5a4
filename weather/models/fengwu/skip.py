"""How the tokens of an encoder reach its decoder past the coarse scale."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from core_gates.attention.constants import INIT_STD
from core_gates.ops.gate_multiply.op import gate_multiply

OPEN = 2.0
"""Logit at which gates start: they pass nine tenths."""


class SkipJoin(nn.Module):
    """Join decoded tokens with those of the encoder, of which a gate lets through what is wanted.

    ``W [x; s * sigmoid(K x)]``, x from the coarse scale and s from the encoder (the attention gate
    of Oktay et al., 2018, for every feature).

    Args:
        dim: Features d of a token.
        gated: False joins all of s, the published form.

    Shape:
        Two volumes (B, d, D, H, W) to one.
    """

    def __init__(self, dim: int, *, gated: bool = True) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, dim) if gated else None
        self.join = nn.Linear(2 * dim, dim)
        for linear in (self.gate, self.join):
            if linear is not None:
                nn.init.trunc_normal_(linear.weight, std=INIT_STD)
                nn.init.zeros_(linear.bias)
        if self.gate is not None:
            nn.init.constant_(self.gate.bias, OPEN)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Return the joined tokens."""
        x, skip = x.movedim(1, -1), skip.movedim(1, -1)
        if self.gate is not None:
            skip = gate_multiply(skip, self.gate(x))
        joined: Tensor = self.join(torch.cat((x, skip), dim=-1))
        return joined.movedim(-1, 1)

    def gate_values(self, x: Tensor, skip: Tensor) -> Tensor:
        """Return the gates (B, d, D, H, W) in [0, 1]; ones where there are none."""
        if self.gate is None:
            return torch.ones_like(skip)
        values: Tensor = self.gate(x.movedim(1, -1)).sigmoid()
        return values.movedim(-1, 1)
