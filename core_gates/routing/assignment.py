"""Searches for assignments: balanced ones of tokens, and permutations of experts."""

import math
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.library import custom_op

from core_gates.errors import check_at_least, check_positive
from core_gates.routing.losses import ENTROPY_EPS

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


T = TypeVar("T", int, Tensor)
F = TypeVar("F", float, Tensor)


@dataclass(frozen=True)
class PermutationSearch:
    """How a `core_gates.gates.permutation.PermutedGate` searches (Ibrahim et al., 2023).

    In step t = 1, 2, …, S - 1 the permutation is relaxed to ``exp(Sinkhorn(B / τ))``; from step S
    on it is fixed. τ falls from ``start`` to ``end`` and the Sinkhorn iterations rise from
    ``first_iterations`` to ``last_iterations`` with t / S.

    At the published ``start`` of 0.001 the scores B / τ begin at ± 50, so that the relaxation is
    almost a permutation from the first step, and the search little more than a random proposal.
    A start of 0.01 or 0.1 moves more mass; the gate's ``report`` measures it.

    Args:
        num_steps: S, in optimizer steps (published: 1 to 10 % of all steps).
        num_permutations: 1 for one permutation that all trees or selectors of the gate share, or
            their number for one each.
        start: First temperature.
        end: Last temperature.
        first_iterations: Sinkhorn iterations at first.
        last_iterations: Sinkhorn iterations at last.
        noise: Factor of Gumbel noise on B in training.

    Raises:
        ValueError: A number is out of range.
    """

    num_steps: int
    num_permutations: int = 1
    start: float = 1e-3
    end: float = 1e-7
    first_iterations: int = 20
    last_iterations: int = 150
    noise: float = 0.0

    def __post_init__(self) -> None:
        check_at_least(2, num_steps=self.num_steps)
        check_at_least(1, num_permutations=self.num_permutations)
        check_at_least(1, first_iterations=self.first_iterations)
        check_at_least(self.first_iterations, last_iterations=self.last_iterations)
        check_at_least(0, noise=self.noise)
        check_positive(start=self.start, end=self.end)

    def temperature_at(self, t: F) -> F:
        """Return τ in step t, a number or a floating tensor."""
        ratio: F = (self.end / self.start) ** (t / self.num_steps)
        return self.start * ratio

    def iterations_at(self, t: T) -> T:
        """Return the number of Sinkhorn iterations in step t, a number or an integer tensor."""
        added: T = (self.last_iterations - self.first_iterations) * t // self.num_steps
        return self.first_iterations + added


def sinkhorn(scores: Tensor, num_iterations: int) -> Tensor:
    """Return ``exp(scores)`` after scaling rows, then columns, to sum 1, repeatedly.

    The scaling is done on logarithms. It tends to a doubly stochastic matrix; columns are exact.

    Args:
        scores: Logarithms of positive matrices (..., E, E).
        num_iterations: Number of scalings of rows and columns.
    """
    for _ in range(num_iterations):
        scores = scores - scores.logsumexp(-1, keepdim=True)
        scores = scores - scores.logsumexp(-2, keepdim=True)
    return scores.exp()


def permutation_entropy(matrices: Tensor) -> Tensor:
    """Return the entropy of the matrices plus that of their rows scaled to sum 1.

    Args:
        matrices: Relaxed permutations (Q, E, E).

    Returns:
        ``Σ -P log(P + 1e-6)`` of both, mean over the Q matrices, in nats; 0 for permutations.
    """
    both = torch.stack([matrices, matrices / matrices.sum(-1, keepdim=True)])
    return -(both * (both + ENTROPY_EPS).log()).sum((-2, -1)).mean(-1).sum()


def best_assignments(matrices: Tensor) -> Tensor:
    """Return the permutations nearest to relaxed ones, by the Hungarian algorithm.

    Args:
        matrices: Relaxed permutations (Q, E, E), read on the host.

    Returns:
        Column (Q, E) of the entry chosen in every row, so that their sum is the largest.
    """
    from scipy.optimize import linear_sum_assignment  # slow to import, and needed here alone

    columns = [
        torch.from_numpy(linear_sum_assignment(matrix, maximize=True)[1])
        for matrix in matrices.detach().cpu().double().numpy()
    ]
    return torch.stack(columns).to(matrices.device, torch.int64)


def nearest_permutations(scores: Tensor, num_iterations: Tensor) -> Tensor:
    """Return ``best_assignments(sinkhorn(scores, num_iterations))``, as one op when compiled.

    Args:
        scores: Logarithms of positive matrices (Q, E, E).
        num_iterations: Number () of Sinkhorn iterations; a tensor, so that a compiled graph
            holds for any.
    """
    return cast(Tensor, _nearest(scores.detach(), num_iterations))


def sinkhorn_in_one_op(scores: Tensor, num_iterations: Tensor) -> Tensor:
    """Return `sinkhorn` of any number of iterations, for graphs of ``torch.compile``.

    A graph of the iterations one by one would be compiled again as their number grows.

    Args:
        scores: Logarithms of positive matrices (..., E, E).
        num_iterations: Number () of scalings of rows and columns.
    """
    return cast(Tensor, _sinkhorn(scores, num_iterations))


def _sinkhorn_forward(scores: Tensor, num_iterations: Tensor) -> Tensor:
    return sinkhorn(scores, int(num_iterations))


def _sinkhorn_backward(grad: Tensor, scores: Tensor, num_iterations: Tensor) -> Tensor:
    """Return the gradient of the scores, from all intermediate matrices, computed once more."""
    matrices = []
    for _ in range(int(num_iterations)):
        for dim in (-1, -2):
            scores = scores - scores.logsumexp(dim, keepdim=True)
            matrices.append((dim, scores.exp()))
    grad = grad * scores.exp()
    for dim, matrix in reversed(matrices):
        grad = grad - matrix * grad.sum(dim, keepdim=True)
    return grad


def _nearest_permutations(scores: Tensor, num_iterations: Tensor) -> Tensor:
    return best_assignments(sinkhorn(scores, int(num_iterations)))


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _backward(grad, *ctx.saved_tensors), None


_nearest = custom_op("core_gates::nearest_permutations", _nearest_permutations, mutates_args=())
_sinkhorn = custom_op("core_gates::sinkhorn", _sinkhorn_forward, mutates_args=())
_backward = custom_op("core_gates::sinkhorn_backward", _sinkhorn_backward, mutates_args=())
_sinkhorn.register_autograd(_differentiate, setup_context=_save)


@_nearest.register_fake
def _(scores: Tensor, _num_iterations: Tensor) -> Tensor:
    return scores.new_empty(scores.shape[:2], dtype=torch.int64)


@_sinkhorn.register_fake
def _(scores: Tensor, _num_iterations: Tensor) -> Tensor:
    return torch.empty_like(scores)


@_backward.register_fake
def _(grad: Tensor, _scores: Tensor, _num_iterations: Tensor) -> Tensor:
    return torch.empty_like(grad)
