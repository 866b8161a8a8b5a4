"""Definition of ``feature_gate``: any floating dtype; in half precision, matmuls alone are halves.

I inputs, N rows, D features, G gates of L maps of rank r, R runs of a gate over an input.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from core_gates.numerics import accumulation_dtype

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def forward(
    v: Tensor,
    mixer: Tensor,
    mixer_bias: Tensor,
    down: Tensor,
    up: Tensor,
    inputs: Sequence[int],
    gates: Sequence[int],
) -> Tensor:
    """Return the inputs of all runs times their factors (R, N, D), in the dtype of ``v``.

    Args:
        v: Inputs (I, N, D).
        mixer: Weights of the mixtures (G, L, D).
        mixer_bias: Their biases (G, L).
        down: First factors of the maps (G, L, r, D).
        up: Second factors of the maps (G, L, r, D).
        inputs: Input of every run (R,).
        gates: Gate of every run (R,).
    """
    factor = factors(v, mixer, mixer_bias, down, up, inputs, gates)
    rows = v.to(factor.dtype).unbind()
    runs = zip(inputs, factor.unbind(), strict=True)
    return torch.stack([rows[i] * run for i, run in runs]).to(v.dtype)


def factors(
    v: Tensor,
    mixer: Tensor,
    mixer_bias: Tensor,
    down: Tensor,
    up: Tensor,
    inputs: Sequence[int],
    gates: Sequence[int],
) -> Tensor:
    """Return the factors ``1 + Σ_l mixture_l (2σ(v down_l up_l) - 1)`` (R, N, D) of all runs."""
    acc = accumulation_dtype(v, mixer, mixer_bias, down, up)
    work = torch.promote_types(v.dtype, torch.promote_types(down.dtype, up.dtype))
    mixer, mixer_bias, down, up = mixer.to(acc), mixer_bias.to(acc), down.to(work), up.to(work)
    by_run: dict[int, Tensor] = {}
    for i, rows in enumerate(v.unbind()):
        runs = runs_of(i, inputs)
        mine = [gates[j] for j in runs]
        hidden = _per_gate(rows.to(work), down[mine].flatten(1, 2))
        hidden = hidden.view(*hidden.shape[:2], *down.shape[1:3])
        logits = (hidden.transpose(1, 2) @ up[mine]).to(acc)  # (K, L, N, D)
        mixture = _per_gate(rows.to(acc), mixer[mine]) + mixer_bias[mine].unsqueeze(1)
        weights = 2 * mixture.softmax(-1).mT.unsqueeze(-1)
        factor = 1 + (weights * (logits.sigmoid() - 0.5)).sum(1)
        by_run |= dict(zip(runs, factor.unbind(), strict=True))
    return torch.stack([by_run[j] for j in range(len(inputs))])


def backward(
    grad: Tensor,
    v: Tensor,
    mixer: Tensor,
    mixer_bias: Tensor,
    down: Tensor,
    up: Tensor,
    inputs: Sequence[int],
    gates: Sequence[int],
) -> Gradients:
    """Return the gradients of v, mixer, mixer_bias, down and up."""
    acc = accumulation_dtype(v, mixer, mixer_bias, down, up)
    tensors = v, mixer, mixer_bias, down, up
    exact = [t.to(acc) for t in tensors]
    sums = [torch.zeros_like(t) for t in exact]
    for j, (i, g) in enumerate(zip(inputs, gates, strict=True)):
        run = _backward_of_run(grad[j].to(acc), exact[0][i], *(t[g] for t in exact[1:]))
        for total, place, value in zip(sums, (i, g, g, g, g), run, strict=True):
            total[place] += value
    gradients = (total.to(t.dtype) for total, t in zip(sums, tensors, strict=True))
    of_v, of_mixer, of_bias, of_down, of_up = gradients
    return of_v, of_mixer, of_bias, of_down, of_up


def _backward_of_run(
    grad: Tensor, v: Tensor, mixer: Tensor, mixer_bias: Tensor, down: Tensor, up: Tensor
) -> Gradients:
    """Return the gradients of one gate over one input (N, D)."""
    hidden = v @ down.mT  # (L, N, r)
    mixture = (v @ mixer.mT + mixer_bias).softmax(-1)
    weights = mixture.mT.unsqueeze(-1)
    opened = (hidden @ up).sigmoid()
    of_factor = grad * v
    of_mixture = 2 * ((opened - 0.5) * of_factor).sum(-1).mT
    of_logits = mixture * (of_mixture - (mixture * of_mixture).sum(-1, keepdim=True))
    slope = 2 * weights * opened * (1 - opened) * of_factor  # (L, N, D)
    of_hidden = slope @ up.mT
    of_v = grad * (1 + (2 * weights * (opened - 0.5)).sum(0))
    of_v = of_v + of_logits @ mixer + (of_hidden @ down).sum(0)
    return of_v, of_logits.mT @ v, of_logits.sum(0), of_hidden.mT @ v, hidden.mT @ slope


def runs_of(i: int, inputs: Sequence[int]) -> list[int]:
    """Return the indices of the runs that read input ``i``."""
    return [j for j, read in enumerate(inputs) if read == i]


def _per_gate(rows: Tensor, weight: Tensor) -> Tensor:
    """Return ``rows @ weight.mT`` (K, N, O) for weights (K, O, D), in one matmul."""
    number, outputs = weight.shape[:2]
    return (rows @ weight.flatten(0, 1).mT).view(rows.shape[0], number, outputs).transpose(0, 1)
