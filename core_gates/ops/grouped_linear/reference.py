"""Definition of ``grouped_linear``: a loop over the groups, differentiable in any dtype."""

import torch
from torch import Tensor
from torch.nn import functional as F

from core_gates.activations import activate


def forward(
    x: Tensor,
    weight: Tensor,
    counts: Tensor,
    bias: Tensor | None = None,
    gather: Tensor | None = None,
    scatter: Tensor | None = None,
    activation: str = "identity",
    gated: bool = False,
) -> Tensor:
    """Return the rows of every group times its weight; see `op.grouped_linear`.

    The weights are taken apart by ``unbind``: indexing them in a loop would allocate a gradient of
    all of them for every group.
    """
    rows = x if gather is None else x.index_select(0, gather)
    sizes = counts.tolist()
    biases = [None] * len(sizes) if bias is None else bias.unbind(0)
    parts = rows.split_with_sizes([*sizes, rows.shape[0] - sum(sizes)])
    scores = [F.linear(*group) for group in zip(parts, weight.unbind(0), biases, strict=False)]
    out = activate(torch.cat(scores), activation, gated)
    out = F.pad(out, (0, 0, 0, parts[-1].shape[0]))
    if scatter is None:
        return out
    return torch.zeros_like(out).index_copy(0, scatter, out)
