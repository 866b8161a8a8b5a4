"""The result of a routing gate and its dense, top-k and hard forms."""

from typing import NamedTuple

import torch
from torch import Tensor

from core_gates.numerics import check_padding_mask, lowest_index_top_k


class RoutingOutput(NamedTuple):
    """Which experts each token uses, and how much.

    Shapes use E experts, K choices, S slots and ``...`` for any leading dimensions.

    Attributes:
        weights: (..., K) with ``indices``; without them (..., E), where an exact zero means *not
            routed*. With ``dispatch`` they are combine weights (..., T, E, S).
        indices: Expert of every choice (..., K), int64.
        kept: False where a choice was dropped (capacity) or its token is ignored (..., K).
        logits: Scores before any normalization (..., E).
        probs: Full normalized scores before selection (..., E).
        dispatch: Weights (..., T, E, S) that mix tokens into slots, for Soft-MoE alone.
        aux: Named scalar losses of the gate, unweighted; the training module weighs and adds them.
    """

    weights: Tensor
    indices: Tensor | None = None
    kept: Tensor | None = None
    logits: Tensor | None = None
    probs: Tensor | None = None
    dispatch: Tensor | None = None
    aux: dict[str, Tensor] | None = None

    @property
    def num_experts(self) -> int:
        """Number of experts.

        Raises:
            ValueError: The output holds indices and neither logits nor probs.
        """
        if self.dispatch is not None:
            return self.weights.shape[-2]
        if self.indices is None:
            return self.weights.shape[-1]
        scores = self.probs if self.probs is not None else self.logits
        if scores is None:
            raise ValueError(
                "a RoutingOutput with indices and neither probs nor logits does not know its number"
                " of experts; pass num_experts"
            )
        return scores.shape[-1]

    def ignore(self, padding_mask: Tensor | None) -> "RoutingOutput":
        """Return the routing with zero weights and nothing kept where ``padding_mask`` is True.

        Args:
            padding_mask: Tokens to ignore (...), or None for none.

        Raises:
            ValueError: The mask does not fit, or the routing consists of slots.
        """
        if padding_mask is None:
            return self
        if self.dispatch is not None:
            raise ValueError("slots mix tokens: mask the padding before their softmax instead")
        check_padding_mask(padding_mask, self.weights.shape[:-1])
        ignored = padding_mask.unsqueeze(-1)
        weights = self.weights.masked_fill(ignored, 0)
        if self.indices is None:
            return self._replace(weights=weights)
        open_ = ~ignored.expand_as(weights)
        return self._replace(
            weights=weights, kept=open_ if self.kept is None else self.kept & open_
        )

    def chosen(self, num_experts: int | None = None, *, dropped: bool = True) -> Tensor:
        """Count how often each token chose each expert.

        Args:
            num_experts: Needed where the output does not know it.
            dropped: Whether choices that were not kept count too.

        Returns:
            Counts (..., E) in the dtype of the weights, without gradient.
        """
        if self.indices is None:
            return (self.to_dense().weights != 0).to(self.weights.dtype)
        ones = torch.ones_like(self.weights)
        if self.kept is not None and not dropped:
            ones = self.kept.to(ones.dtype)
        return self._scatter(ones, num_experts)

    def to_dense(self, num_experts: int | None = None) -> "RoutingOutput":
        """Return the same routing with weights (..., E) and zeros where nothing is routed.

        Choices that were not kept weigh nothing. The slots of a Soft-MoE are summed.

        Args:
            num_experts: Needed where the output does not know it.
        """
        if self.dispatch is not None:
            return self._replace(weights=self.weights.sum(-1), dispatch=None)
        if self.indices is None:
            return self
        weights = self._scatter(self._kept_weights(), num_experts)
        return self._replace(weights=weights, indices=None, kept=None)

    def to_top_k(self, k: int) -> "RoutingOutput":
        """Return the ``k`` largest weights of each token with their experts, not rescaled.

        ``kept`` is False where fewer than ``k`` experts are routed. Ties go to the lowest index.

        Args:
            k: Choices of each token, at most those the routing has.

        Raises:
            ValueError: ``k`` is out of range, or the routing consists of slots.
        """
        if self.dispatch is not None:
            raise ValueError("slots mix tokens: a Soft-MoE routing has no top-k form")
        available = self.weights.shape[-1]
        if not 1 <= k <= available:
            raise ValueError(f"k must lie between 1 and the {available} weights given, got {k}")
        weights, order = lowest_index_top_k(self._kept_weights(), k)
        indices = order if self.indices is None else self.indices.gather(-1, order)
        return self._replace(weights=weights, indices=indices, kept=weights != 0)

    def hard(self) -> "RoutingOutput":
        """Return the largest choice of each token with weight one.

        The gradient of the weight is that of the soft weight (straight through). Tokens that
        are not routed at all keep weight zero and ``kept`` False.
        """
        top = self.to_top_k(1)
        straight_through = 1 + (top.weights - top.weights.detach())
        return top._replace(weights=torch.where(top.weights != 0, straight_through, 0))

    def _kept_weights(self) -> Tensor:
        return self.weights if self.kept is None else self.weights.masked_fill(~self.kept, 0)

    def _scatter(self, values: Tensor, num_experts: int | None) -> Tensor:
        if self.indices is None:
            raise ValueError("only a routing with indices can be scattered")
        size = self.num_experts if num_experts is None else num_experts
        zeros = values.new_zeros(*values.shape[:-1], size)
        return zeros.scatter_add(-1, self.indices, values)
