"""The COMET gate and its trees: probabilities of leaves, whole or along the open branches.

A tree of E leaves has E - 1 inner nodes in the numbering of a heap: node i has the children
2i + 1 (left) and 2i + 2 (right) and is a leaf if i >= E - 1. Such a tree has leaves on its last two
levels only, the deeper ones to the left; experts are its leaves from left to right.
"""

import torch
from torch import Tensor, nn

from core_gates.errors import check_at_least, check_positive
from core_gates.numerics import accumulation_dtype, check_padding_mask, ignored_as_zero, linear_fp32
from core_gates.ops.elementwise import check_gamma, smooth_step
from core_gates.routing.base import Gate
from core_gates.routing.losses import selection_entropy
from core_gates.routing.output import RoutingOutput


def leaf_probabilities(left: Tensor) -> Tensor:
    """Return the probability of arriving at each leaf.

    Args:
        left: Probabilities (..., E - 1) of going left at each inner node.

    Returns:
        Products (..., E) of the probabilities along the path, leaves from left to right.
    """
    num_nodes = left.shape[-1]
    reach = torch.ones_like(left[..., :1])
    shallow, first = reach[..., :0], 0
    while first < num_nodes:  # one level of the tree, nodes `first`, `first` + 1, …
        num_inner = min(reach.shape[-1], num_nodes - first)
        inner, shallow = reach[..., :num_inner], reach[..., num_inner:]
        turn = left[..., first : first + num_inner]
        reach = torch.stack([inner * turn, inner * (1 - turn)], -1).flatten(-2)
        first = 2 * first + 1
    return torch.cat([reach, shallow], -1)


def leaf_numbers(nodes: Tensor, num_leaves: int) -> Tensor:
    """Return the number from the left of leaves given by their number in the heap.

    Args:
        nodes: Numbers in the heap, from ``num_leaves - 1`` to ``2 * num_leaves - 2``.
        num_leaves: Number of leaves E.
    """
    first_of_last_level = (1 << (num_leaves - 1).bit_length()) - 1
    return (nodes - first_of_last_level) % num_leaves


CHUNK = 2**20
"""Elements of the copies of inputs and weights that scattered dot products make at a time."""


def row_products(x: Tensor, rows: Tensor, weight: Tensor, trees: Tensor, nodes: Tensor) -> Tensor:
    """Return the dot products of chosen rows of inputs and weights.

    Args:
        x: Inputs (T, D).
        rows: Row of ``x`` of each dot product (N,).
        weight: Weights (J, nodes, D).
        trees: Tree of each dot product (N,).
        nodes: Node of each dot product (N,).

    Returns:
        Dot products (N,).
    """
    size = max(1, CHUNK // x.shape[1])
    parts = []
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            chosen = weight[trees[part], nodes[part]]
            parts.append(torch.bmm(x[rows[part]].unsqueeze(1), chosen.unsqueeze(2)).flatten())
    return torch.cat(parts) if parts else x.new_empty(0)


def walk(
    x: Tensor,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: float,
    closed: float,
    most_open: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Follow every tree from its root, evaluating a node only for rows that arrive at it.

    Args:
        x: Inputs (T, D).
        rows: The rows of ``x`` to route.
        weight: Weights (J, E - 1, D) of the inner nodes of J trees.
        bias: Biases (J, E - 1).
        gamma: Width of the smooth step.
        closed: A branch of at most this probability is not followed.
        most_open: Largest mean number of branches of a tree that are followed side by side.

    Returns:
        Row, tree, leaf from the left, and probability of every arrival at a leaf; None where more
        branches are open.
    """
    num_trees, num_nodes = weight.shape[:2]
    trees = torch.arange(num_trees, device=x.device).repeat(len(rows))
    rows = rows.repeat_interleave(num_trees)
    nodes, reach = torch.zeros_like(rows), x.new_ones(len(rows))
    most, arrivals = most_open * len(nodes), []
    while len(nodes):
        if len(nodes) > most:
            return None
        scores = row_products(x, rows, weight, trees, nodes)
        if bias is not None:
            scores = scores + bias[trees, nodes]
        left = smooth_step(scores, gamma)
        rows, trees = rows.repeat(2), trees.repeat(2)
        nodes = torch.cat([2 * nodes + 1, 2 * nodes + 2])
        reach = torch.cat([reach * left, reach * (1 - left)])
        is_open = ~(reach <= closed)  # a NaN stays, and shows
        is_leaf = nodes >= num_nodes
        frontier = (rows, trees, nodes, reach)
        arrivals.append([part[is_open & is_leaf] for part in frontier])
        rows, trees, nodes, reach = (part[is_open & ~is_leaf] for part in frontier)
    if not arrivals:
        return rows, trees, nodes, reach
    rows, trees, nodes, reach = (torch.cat(parts) for parts in zip(*arrivals, strict=True))
    return rows, trees, leaf_numbers(nodes, num_nodes + 1), reach


_MOST_OPEN = 8  # branches of a tree that scattered reads follow faster than one matmul


class CometGate(Gate):
    """Choose experts by ``k`` trees whose branches close exactly (Ibrahim et al., 2023).

    Every tree has the experts as leaves. At an inner node a token goes left with probability
    ``smooth_step(x · a + b)``, which is exactly 0 or 1 outside a band of width γ, so that most
    leaves end with probability P = 0. A leaf scores ``x · v + c + log(P + ε)``; the weights are the
    softmax of the scores over all leaves of all trees, exactly 0 where P is 0. The loss ``entropy``
    presses each tree towards one leaf, hence the gate towards at most ``k`` experts; before that
    up to all of them are active.

    In evaluation without gradients a gate of many experts follows the open branches alone: no node
    or leaf below a closed branch is evaluated. The scattered reads make that slower than one
    matmul with all nodes for fewer experts: on one CPU core they meet between 256 and 512 experts
    (k = 2, batches of 2048; at 1024 it is twice as fast). While more than 8 branches of a tree are
    open on average, as early in training, everything is evaluated.

    Args:
        dim: Features of a token.
        num_experts: Number of experts, at least 2.
        k: Number of trees.
        gamma: Width γ of the smooth step; small values close branches early.
        node_bias: Whether inner nodes have a bias; without it, biases of leaves start at zero.
        prob_floor: Leaves of at most this probability are closed.
        log_eps: ε in the logarithm.
        conditional_from: Number of experts from which evaluation follows open branches alone.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Shape:
        ``x`` (..., D); weights and probs (..., E), equal. The trees have no common logits.

    Raises:
        ValueError: A number is out of range.
    """

    renormalize = True

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        k: int = 2,
        gamma: float = 1.0,
        node_bias: bool = True,
        prob_floor: float = 0.0,
        log_eps: float = 1e-8,
        conditional_from: int = 512,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_experts)
        check_at_least(2, num_experts=num_experts)
        check_gamma(gamma)
        if not 0 <= prob_floor < 1 / num_experts:
            raise ValueError(
                f"prob_floor must lie between 0 and 1/num_experts={1 / num_experts:.3g}, which is"
                f" excluded as it could close every leaf; got {prob_floor}"
            )
        check_positive(log_eps=log_eps)
        self.k = self.checked_k(k)
        self.gamma = gamma
        self.prob_floor = prob_floor
        self.log_eps = log_eps
        self.conditional_from = conditional_from

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(k, *shape, device=device, dtype=dtype))

        self.node_weight = parameter(num_experts - 1, dim)
        self.node_bias = parameter(num_experts - 1) if node_bias else None
        self.leaf_weight = parameter(num_experts, dim)
        self.leaf_bias = parameter(num_experts)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw nodes from U(±γ/100), so that all branches start open, and leaves from U(±0.05)."""
        nn.init.uniform_(self.node_weight, -self.gamma / 100, self.gamma / 100)
        nn.init.uniform_(self.leaf_weight, -0.05, 0.05)
        if self.node_bias is None:
            nn.init.zeros_(self.leaf_bias)
        else:
            nn.init.uniform_(self.node_bias, -self.gamma / 100, self.gamma / 100)
            nn.init.uniform_(self.leaf_bias, -0.05, 0.05)

    def forward(
        self,
        x: Tensor,
        *,
        ids: Tensor | None = None,  # noqa: ARG002
        padding_mask: Tensor | None = None,
    ) -> RoutingOutput:
        """Route every token of ``x``; see `Gate`."""
        selectors, leaves = self._select(x, padding_mask)
        weights = selectors.sum(-2)
        aux = {
            "entropy": selection_entropy(leaves, padding_mask=padding_mask, floor=self.prob_floor)
        }
        return RoutingOutput(weights, probs=weights, aux=aux).ignore(padding_mask)

    def selectors(
        self,
        x: Tensor,
        *,
        ids: Tensor | None = None,  # noqa: ARG002
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the weights (..., J, E) of each of the J = ``k`` trees before they are summed."""
        return ignored_as_zero(self._select(x, padding_mask)[0], padding_mask)

    def extra_repr(self) -> str:
        """Show the sizes in ``print(gate)``."""
        return f"{super().extra_repr()}, k={self.k}, gamma={self.gamma}"

    def _select(self, x: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the weights (..., J, E) of the leaves and the probabilities of arriving there."""
        open_scores = None
        if self._follows_open_branches():
            open_scores = self._scores_along_open_branches(x, padding_mask)
        scores, leaves = (
            self._scores_of_all(x, padding_mask) if open_scores is None else open_scores
        )
        return scores.flatten(-2).softmax(-1).view(scores.shape), leaves

    def _scores_of_all(self, x: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        turns = self._linear(x, self.node_weight, self.node_bias, padding_mask)
        leaves = leaf_probabilities(smooth_step(turns, self.gamma))
        scores = self._linear(x, self.leaf_weight, self.leaf_bias, padding_mask)
        scores = scores + (leaves + self.log_eps).log()
        return scores.masked_fill(leaves <= self.prob_floor, -torch.inf), leaves

    def _linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, padding_mask: Tensor | None
    ) -> Tensor:
        bias = None if bias is None else bias.flatten()
        out = linear_fp32(x, weight.flatten(0, 1), bias, padding_mask=padding_mask)
        return out.view(*x.shape[:-1], *weight.shape[:2])

    def _follows_open_branches(self) -> bool:
        return not (
            self.training
            or self.num_experts < self.conditional_from
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or self.leaf_bias.is_meta
        )

    def _scores_along_open_branches(
        self, x: Tensor, padding_mask: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """Return scores and probabilities of the leaves (..., J, E); None if many are open."""
        if x.shape[-1:] != (self.dim,):
            raise ValueError(f"x {tuple(x.shape)} must end in the {self.dim} features of the gate")
        acc = accumulation_dtype(x, self.leaf_bias)
        node_weight, leaf_weight = self.node_weight.to(acc), self.leaf_weight.to(acc)
        node_bias = None if self.node_bias is None else self.node_bias.to(acc)
        leading, x = x.shape[:-1], x.to(acc).reshape(-1, self.dim)
        rows = torch.arange(len(x), device=x.device)
        if padding_mask is not None:
            check_padding_mask(padding_mask, leading)
            rows = rows[~padding_mask.flatten()]
        arrivals = walk(x, rows, node_weight, node_bias, self.gamma, self.prob_floor, _MOST_OPEN)
        if arrivals is None:
            return None
        rows, trees, experts, reach = arrivals
        scores = row_products(x, rows, leaf_weight, trees, experts)
        scores = scores + self.leaf_bias[trees, experts]
        scores = scores + (reach + self.log_eps).log()
        places = (rows, trees, experts)
        leaves = x.new_zeros(len(x), self.k, self.num_experts)
        all_scores = torch.full_like(leaves, -torch.inf).index_put(places, scores)
        shape = (*leading, self.k, self.num_experts)
        return all_scores.view(shape), leaves.index_put(places, reach).view(shape)
