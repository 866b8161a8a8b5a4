"""The trees of the COMET gate: probabilities of leaves, whole or along the open branches alone.

A tree of E leaves has E - 1 inner nodes in the numbering of a heap: node i has the children
2i + 1 (left) and 2i + 2 (right) and is a leaf if i >= E - 1. Such a tree has leaves on its last two
levels only, the deeper ones to the left; experts are its leaves from left to right.
"""

import torch
from torch import Tensor

from core_gates.ops.smooth_step.op import smooth_step


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
