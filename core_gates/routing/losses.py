"""Losses and regularizers of routings."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from core_gates.errors import check_option
from core_gates.numerics import check_padding_mask
from core_gates.routing.output import RoutingOutput

Scope = Literal["batch", "sequence", "global"]


def balance_loss(
    routing: RoutingOutput,
    *,
    scope: Scope = "batch",
    padding_mask: Tensor | None = None,
    padding_in_loss: bool = False,
    group: dist.ProcessGroup | None = None,
    gate: str = "gate",
) -> Tensor:
    """Return ``E Σ_e f_e P_e`` (Fedus et al., 2021), which is 1 for a balanced routing.

    f_e is the fraction of choices that fall on expert e, dropped ones included and without
    gradient; P_e the mean of the full ``probs``, divided by their sum at each token, so that a gate
    whose experts open independently does not lower the loss by closing them. Tokens where ``probs``
    are all zero do not count.

    It is 1/K of ``load_balancing_loss_func`` of transformers, where f sums to K: a coefficient
    ``router_aux_loss_coef`` is K times as large here. Transformers joins the tokens of all layers,
    for which the mean of this loss over the layers is the nearest.

    Args:
        routing: Output of a gate, with ``probs`` (..., E).
        scope: Over what f and P are taken: ``batch``, all tokens of this call; ``sequence``,
            each sequence along dimension -2, then averaged over sequences; ``global``, all ranks
            (every rank must call): the mean of the loss over ranks is that of the joined batch.
        padding_mask: True (...) at tokens to ignore.
        padding_in_loss: Whether ignored tokens still count.
        group: Ranks of the scope ``global``; all by default.
        gate: Name of the gate, for errors.

    Raises:
        ValueError: ``probs`` is missing, the mask does not fit, or the scope is unknown.
    """
    check_option("scope", scope, get_args(Scope))
    probs, counts = _normalized(*_scores(routing, "probs", gate, padding_mask, padding_in_loss))
    chosen = _zeroed(routing.chosen(probs.shape[-1]), counts)
    if scope == "sequence":
        return _mean_over_sequences(chosen, probs, counts)
    num_positions = counts.sum().to(probs.dtype)
    total_chosen, total_probs = _total(chosen), _total(_zeroed(probs, counts))
    if scope == "global" and dist.is_initialized():
        for total in (total_chosen, num_positions):
            dist.all_reduce(total, group=group)
        num_positions = num_positions / dist.get_world_size(group)
    share = total_chosen / total_chosen.sum().clamp(min=1)
    return probs.shape[-1] * (share * total_probs).sum() / num_positions.clamp(min=_TINY)


def z_loss(
    routing: RoutingOutput,
    *,
    padding_mask: Tensor | None = None,
    padding_in_loss: bool = False,
    gate: str = "gate",
) -> Tensor:
    """Return the mean squared log-partition of the logits (Zoph et al., 2022).

    Args:
        routing: Output of a gate, with ``logits`` (..., E).
        padding_mask: True (...) at tokens to ignore.
        padding_in_loss: Whether ignored tokens still count.
        gate: Name of the gate, for errors.

    Raises:
        ValueError: ``logits`` is missing or the mask does not fit.
    """
    logits, counts = _scores(routing, "logits", gate, padding_mask, padding_in_loss)
    return _mean(logits.logsumexp(-1).square(), counts)


def entropy_loss(
    routing: RoutingOutput,
    *,
    padding_mask: Tensor | None = None,
    padding_in_loss: bool = False,
    gate: str = "gate",
) -> Tensor:
    """Return the mean entropy of the probabilities of a token, in nats.

    Args:
        routing: Output of a gate, with ``probs`` (..., E).
        padding_mask: True (...) at tokens to ignore.
        padding_in_loss: Whether ignored tokens still count.
        gate: Name of the gate, for errors.

    Raises:
        ValueError: ``probs`` is missing or the mask does not fit.
    """
    probs, counts = _scores(routing, "probs", gate, padding_mask, padding_in_loss)
    return _mean(_entropy(probs), counts)


def information_loss(
    routing: RoutingOutput,
    *,
    padding_mask: Tensor | None = None,
    padding_in_loss: bool = False,
    gate: str = "gate",
) -> Tensor:
    """Return the negative mutual information of tokens and experts, in nats.

    The mean entropy of a token less the entropy of the mean probabilities: between ``-log E``,
    where every token is confident of its expert and all experts are used equally, and 0, where all
    tokens choose alike (Chen et al., 2023).

    Args:
        routing: Output of a gate, with ``probs`` (..., E).
        padding_mask: True (...) at tokens to ignore.
        padding_in_loss: Whether ignored tokens still count.
        gate: Name of the gate, for errors.

    Raises:
        ValueError: ``probs`` is missing or the mask does not fit.
    """
    probs, counts = _scores(routing, "probs", gate, padding_mask, padding_in_loss)
    mean = _total(probs) / counts.sum().clamp(min=1)
    return _mean(_entropy(probs), counts) - _entropy(mean)


def l0_loss(
    routing: RoutingOutput,
    *,
    padding_mask: Tensor | None = None,
    padding_in_loss: bool = False,
    gate: str = "gate",
) -> Tensor:
    """Return the expected number of open experts of a token (Louizos et al., 2018).

    For gates whose experts open independently: ``probs`` is then the probability that an expert is
    open. A softmax gives the constant 1.

    Args:
        routing: Output of a gate, with ``probs`` (..., E).
        padding_mask: True (...) at tokens to ignore.
        padding_in_loss: Whether ignored tokens still count.
        gate: Name of the gate, for errors.

    Raises:
        ValueError: ``probs`` is missing or the mask does not fit.
    """
    probs, counts = _scores(routing, "probs", gate, padding_mask, padding_in_loss)
    return _mean(probs.sum(-1), counts)


def importance_loss(
    routing: RoutingOutput,
    *,
    padding_mask: Tensor | None = None,
    padding_in_loss: bool = False,
) -> Tensor:
    """Return the squared coefficient of variation of the experts' total weights.

    Population variance over squared mean (Shazeer et al., 2017); 0 for equal totals.

    Args:
        routing: Output of a gate that knows its number of experts.
        padding_mask: True (...) at tokens to ignore.
        padding_in_loss: Whether ignored tokens still count.

    Raises:
        ValueError: The routing does not know its number of experts or the mask does not fit.
    """
    weights = routing.to_dense().weights
    importance = _total(_zeroed(weights, _counted(weights, padding_mask, padding_in_loss)))
    return importance.var(correction=0) / importance.mean().square().clamp(min=_TINY)


def orthogonality_loss(weight: Tensor) -> Tensor:
    """Return the mean squared cosine between the rows of different experts.

    0 where the rows are orthogonal, 1 where all point the same way or the opposite. The lengths of
    the rows do not matter.

    Args:
        weight: Weight of a gate (..., E, D), one row per expert; leading dimensions, such as trees,
            are averaged. One expert gives 0.
    """
    num_experts = weight.shape[-2]
    directions = F.normalize(weight, dim=-1)
    cosines = directions @ directions.mT
    others = ~torch.eye(num_experts, dtype=torch.bool, device=weight.device)
    pairs = max(num_experts * (num_experts - 1), 1)
    return (cosines.square() * others).sum((-2, -1)).mean() / pairs


_TINY = torch.finfo(torch.float32).tiny


def _scores(
    routing: RoutingOutput,
    field: Literal["logits", "probs"],
    gate: str,
    padding_mask: Tensor | None,
    padding_in_loss: bool,
) -> tuple[Tensor, Tensor]:
    """Return a field (..., E), zero at the tokens that do not count, and which tokens do (...)."""
    value = getattr(routing, field)
    if not isinstance(value, Tensor):
        raise ValueError(
            f"this loss needs RoutingOutput.{field}, which gate {gate!r} does not return;"
            " choose another loss or gate"
        )
    counts = _counted(value, padding_mask, padding_in_loss)
    return _zeroed(value, counts), counts


def _counted(scores: Tensor, padding_mask: Tensor | None, padding_in_loss: bool) -> Tensor:
    """Return True (...) at the tokens that count."""
    if padding_mask is None:
        return torch.ones(scores.shape[:-1], dtype=torch.bool, device=scores.device)
    check_padding_mask(padding_mask, scores.shape[:-1])
    return torch.ones_like(padding_mask) if padding_in_loss else ~padding_mask


def _zeroed(scores: Tensor, counts: Tensor) -> Tensor:
    return scores.masked_fill(~counts.unsqueeze(-1), 0)


def _normalized(probs: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return probabilities that sum to one where tokens count, and where they do."""
    total = probs.sum(-1)
    counts = counts & ~(total < torch.finfo(total.dtype).tiny)  # a NaN counts, to be seen
    return probs / total.masked_fill(~counts, 1).unsqueeze(-1), counts


def _total(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1]).sum(0)


def _entropy(probs: Tensor) -> Tensor:
    logs = probs.clamp(min=torch.finfo(probs.dtype).tiny).log()  # 0 log 0 = 0, gradient finite
    return -(probs * logs).sum(-1)


def _mean(values: Tensor, counts: Tensor) -> Tensor:
    return values.masked_fill(~counts, 0).sum() / counts.sum().clamp(min=1)


def _mean_over_sequences(chosen: Tensor, probs: Tensor, counts: Tensor) -> Tensor:
    num_positions = counts.sum(-1)
    totals = chosen.sum(-2)
    share = totals / totals.sum(-1, keepdim=True).clamp(min=1)
    mean = _zeroed(probs, counts).sum(-2) / num_positions.clamp(min=1).unsqueeze(-1)
    return _mean(probs.shape[-1] * (share * mean).sum(-1), num_positions > 0)


ENTROPY_EPS = 1e-6


def sum_over_positions(values: Tensor, *, padding_mask: Tensor | None = None) -> Tensor:
    """Return the sums (N,) of values (..., N) over the tokens that are not ignored.

    Args:
        values: Values (..., N).
        padding_mask: True (...) at tokens to ignore.
    """
    if padding_mask is not None:
        values = values.masked_fill(padding_mask.unsqueeze(-1), 0)
    return values.reshape(math.prod(values.shape[:-1]), values.shape[-1]).sum(0)


def mean_over_positions(values: Tensor, *, padding_mask: Tensor | None = None) -> Tensor:
    """Return the means (N,) of values (..., N) over the tokens that are not ignored.

    Args:
        values: Values (..., N).
        padding_mask: True (...) at tokens to ignore; without any other token the mean is 0.
    """
    total = sum_over_positions(values, padding_mask=padding_mask)
    if padding_mask is None:
        return total / max(1, math.prod(values.shape[:-1]))
    return total / (~padding_mask).sum().clamp(min=1)


def selection_entropy(
    probs: Tensor, *, padding_mask: Tensor | None = None, floor: float = 0.0
) -> Tensor:
    """Return the mean over tokens of ``Σ_j Σ_e -P log(P + 1e-6)``, in nats.

    It is small if every tree or selector j of a token points at one expert.

    Args:
        probs: Probabilities P (..., J, E).
        padding_mask: True (...) at tokens to ignore.
        floor: Smaller probabilities count as this one.
    """
    probs = probs.clamp(min=floor)
    entropy = -(probs * (probs + ENTROPY_EPS).log()).sum((-2, -1))
    return mean_over_positions(entropy.unsqueeze(-1), padding_mask=padding_mask).squeeze(-1)
