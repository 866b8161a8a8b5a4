"""Batch normalization of stacked experts, together with the activation that follows."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from core_gates.collectives import Group, num_ranks
from core_gates.numerics import accumulation_dtype, widest_float
from core_gates.ops.norm_act.op import norm_act
from core_gates.ops.norm_act.reference import per_expert
from core_gates.routing.repeated import in_backward
from core_gates.training.sync_batch_norm import SyncBatchNorm, moments_of_ranks


class ExpertNorm(SyncBatchNorm):
    """Normalize every channel of every expert over the rows of all ranks, then activate.

    Parameters and statistics are stacked: (E, C).

    Args:
        num_experts: Number of experts E.
        num_features: Channels C of an expert.
        eps: Added to the variance.
        momentum: Weight of a new batch in the running statistics; None averages all batches.
        group: Process group; all ranks if None.
        device: Device of parameters and statistics.
        dtype: Floating dtype of the parameters and statistics.
    """

    def __init__(
        self,
        num_experts: int,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        *,
        group: Group = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, group=group, device=device, dtype=dtype)
        options = {"device": device, "dtype": dtype}
        shape = num_experts, num_features
        for name in ("weight", "bias"):
            setattr(self, name, nn.Parameter(torch.empty(shape, **options)))  # type: ignore[arg-type]
        for name in ("running_mean", "running_var"):
            setattr(self, name, torch.empty(shape, **options))  # type: ignore[arg-type]
        self.reset_parameters()  # type: ignore[no-untyped-call]

    def forward(  # type: ignore[override]
        self, x: Tensor, offset: Tensor, experts: Sequence[int], activation: str
    ) -> Tensor:
        """Normalize and activate the outputs of linear layers.

        Args:
            x: Outputs (O, N, C).
            offset: Bias of the linear layers (E, C), added to ``x``.
            experts: Expert of every output (O,), in ascending order.
            activation: One of those of experts.

        Returns:
            Activations (O, N, C).

        Raises:
            ValueError: A single row is to be normalized by itself.
        """
        assert self.running_mean is not None
        assert self.running_var is not None
        tensors = x, offset, self.weight, self.bias
        options: dict[str, Any] = {"experts": experts, "activation": activation, "eps": self.eps}
        if not self.training:
            return norm_act(*tensors, (self.running_mean, self.running_var), **options)[0]
        counts: Tensor | int = x.shape[1]
        if num_ranks(self.group) > 1:
            mean, variance, counts = self._of_ranks(x, offset, experts)
            y, mean, variance = norm_act(*tensors, (mean, variance), **options)
        elif x.shape[1] < 2:
            raise ValueError(
                "batch normalization needs more than 1 row in training, got a batch of"
                f" {x.shape[1]}: drop the last, small batch"
            )
        else:
            if len(experts) > len(offset):
                counts = _counts(x, experts, len(offset))
            y, mean, variance = norm_act(*tensors, **options)
        if not in_backward():
            self._move(mean, variance, counts)
        return y

    def _of_ranks(
        self, x: Tensor, offset: Tensor, experts: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean and variance (E, C) of the rows of all ranks, and their number (E, 1)."""
        exact = x.to(accumulation_dtype(x))
        rows = _counts(x, experts, len(offset))
        index = torch.tensor(list(experts), device=x.device)
        sums = per_expert(exact.sum(1), experts, len(offset))
        mean = sums / rows.clamp(min=1)
        squares = (exact - mean[index].unsqueeze(1)).square().sum(1)
        squares = per_expert(squares, experts, len(offset))
        mean, variance, rows = moments_of_ranks(mean, squares, rows, self.group)
        mean = mean + offset
        return mean.to(exact.dtype), variance.to(exact.dtype), rows

    @torch.no_grad()
    def _move(self, mean: Tensor, variance: Tensor, rows: Tensor | int) -> None:
        """Move the running statistics; a batch that is empty on all ranks moves nothing.

        Args:
            mean: Mean (E, C).
            variance: Biased variance (E, C).
            rows: Number of rows of every expert (E, 1), or of each.
        """
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        share: Tensor | float | None = self.momentum
        if isinstance(rows, Tensor):
            moved = rows > 0
            self.num_batches_tracked += moved[0, 0].to(torch.int64)
            correction: Tensor | float = rows / (rows - 1).clamp(min=1)
        else:
            moved = None
            self.num_batches_tracked += 1
            correction = rows / (rows - 1)
        if share is None:
            share = 1 / self.num_batches_tracked.clamp(min=1).to(mean.dtype)
        share = share if moved is None else share * moved.to(mean.dtype)
        for running, new in (
            (self.running_mean, mean),
            (self.running_var, variance * correction),
        ):
            running.lerp_(new.to(running.dtype), _like(share, running))


def _like(share: Tensor | float, running: Tensor) -> Any:
    return share.to(running.dtype) if isinstance(share, Tensor) else share


def _counts(x: Tensor, experts: Sequence[int], num_experts: int) -> Tensor:
    """Return the number of rows of every expert (E, 1)."""
    rows = [x.shape[1] * list(experts).count(e) for e in range(num_experts)]
    return torch.tensor(rows, dtype=widest_float(x.device), device=x.device).unsqueeze(1)
