"""The balanced assignment of tokens to experts: exact if they are few, else by auction."""

import math
from typing import cast

import torch
from torch import Tensor
from torch.library import custom_op

_LIMIT = 1e9  # beyond it a score decides by itself
_FIRST_STEP, _SHRINK, _LAST_STEP = 0.25, 0.2, 1e-7  # of the range of the scores
_GAP = 2e-4


def balanced_assignment(
    scores: Tensor, counted: Tensor | None = None, *, exact_up_to: int = 1024
) -> Tensor:
    """Assign every token to one expert such that the sum of the scores is maximal.

    Of the T tokens of a group no expert takes more than ⌈T / E⌉, which is T / E each if E divides
    T. Up to ``exact_up_to`` tokens the sum is the largest possible. Beyond, an auction comes within
    0.02 % of it, by the measure of a bound that it keeps: the smaller of the sum itself and of what
    the sum gains over a random assignment.

    The work is done on the host in float64, wherever the scores are.

    Args:
        scores: Scores (G, T, E), without gradient; a NaN is read as zero.
        counted: False (G, T) at tokens that are not assigned; their expert has no meaning.
        exact_up_to: Largest number of tokens of a group that is solved exactly.

    Returns:
        Expert of every token (G, T), int64.
    """
    return cast(Tensor, _assign(scores, counted, exact_up_to))


def solve_exactly(scores: Tensor) -> Tensor:
    """Return the best balanced assignment of (T, E) float64 scores on the CPU (Kuhn, 1955)."""
    from scipy.optimize import linear_sum_assignment  # slow to import, and needed here alone

    num_tokens, num_experts = scores.shape
    places = math.ceil(num_tokens / num_experts)
    _, columns = linear_sum_assignment(scores.repeat_interleave(places, 1).numpy(), maximize=True)
    return torch.from_numpy(columns) // places


def auction(scores: Tensor) -> Tensor:
    """Return a nearly best balanced assignment of (T, E) float64 scores on the CPU.

    Free tokens bid for their best expert, all at once; each expert keeps its ⌈T / E⌉ highest bids,
    and its price is the lowest of them (Bertsekas, 1988). A bid exceeds the price by the gain over
    the second-best expert and a step; the sum ends within T steps of the optimum. From a coarse
    step to ever finer ones the prices are carried over, until the bound shows that the optimum is
    near enough.
    """
    num_tokens, num_experts = scores.shape
    places = math.ceil(num_tokens / num_experts)
    if num_experts == 1 or float(scores.max()) == float(scores.min()):
        return torch.arange(num_tokens) % num_experts
    spread = float(scores.max() - scores.min())
    at_random = float(scores.mean(1).sum())
    idle = scores.new_zeros(places * num_experts - num_tokens, num_experts)
    padded = torch.cat([scores, idle])  # so that every expert is full in the end
    prices = scores.new_zeros(num_experts)
    step = _FIRST_STEP * spread
    while True:
        experts, prices = _bid(padded, prices, step, places)
        total = float(scores.gather(1, experts[:num_tokens, None]).sum())
        bound = float((padded - prices).amax(1).sum() + places * prices.sum())
        enough = _GAP * min(abs(total), total - at_random)
        if bound - total <= enough or step <= _LAST_STEP * spread:
            return experts[:num_tokens]
        step *= _SHRINK


def _bid(scores: Tensor, prices: Tensor, step: float, places: int) -> tuple[Tensor, Tensor]:
    """Return experts (N,) and prices (E,) once each of the N = E ``places`` tokens has a place."""
    num_tokens, num_experts = scores.shape
    nobody = num_experts
    experts, bids = torch.full((num_tokens,), nobody), scores.new_zeros(num_tokens)
    prices = prices.clone()
    free = torch.arange(num_tokens)
    while len(free):
        values, columns = (scores[free] - prices).topk(2, -1)
        wanted = columns[:, 0]
        experts[free] = wanted
        bids[free] = prices[wanted] + values[:, 0] - values[:, 1] + step
        outbid = [free[:0]]
        for expert in sorted(set(wanted.tolist())):
            bidders = (experts == expert).nonzero()[:, 0]
            if len(bidders) < places:
                continue
            order = bids[bidders].argsort(descending=True, stable=True)
            prices[expert] = bids[bidders[order[places - 1]]]
            outbid.append(bidders[order[places:]])
        free = torch.cat(outbid)
        experts[free] = nobody
    return experts, prices


def _on_host(scores: Tensor, counted: Tensor | None, exact_up_to: int) -> Tensor:
    experts = torch.zeros(scores.shape[:2], dtype=torch.int64)
    exact = scores.detach().cpu().double().nan_to_num(0.0).clamp(-_LIMIT, _LIMIT)
    real = None if counted is None else counted.cpu()
    for group, values in enumerate(exact):
        rows = slice(None) if real is None else real[group]
        values = values[rows]
        if len(values):
            solve = solve_exactly if len(values) <= exact_up_to else auction
            experts[group, rows] = solve(values)
    return experts.to(scores.device)


_assign = custom_op("core_gates::balanced_assignment", _on_host, mutates_args=())


@_assign.register_fake
def _(scores: Tensor, _counted: Tensor | None, _exact_up_to: int) -> Tensor:
    return scores.new_empty(scores.shape[:2], dtype=torch.int64)
