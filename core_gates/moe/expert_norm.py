"""Batch normalization of stacked experts, together with the activation that follows."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from core_gates.collectives import Group, num_ranks
from core_gates.numerics import accumulation_dtype
from core_gates.ops.norm_act.op import norm_act
from core_gates.routing.repeated import in_backward
from core_gates.training.sync_batch_norm import SyncBatchNorm, statistics_of_ranks


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

    def forward(self, xs: Sequence[Tensor], activation: str) -> list[Tensor]:  # type: ignore[override]
        """Normalize and activate the outputs of linear layers.

        Args:
            xs: Outputs (E', N, C) of some experts after those of others, of all E together; N may
                differ.
            activation: One of those of experts.

        Returns:
            Activations of the shapes of ``xs``.

        Raises:
            ValueError: A single row is to be normalized by itself.
        """
        outputs: list[Tensor] = []
        share = self._share() if self.training and not in_backward() else None
        first = 0
        for x in xs:
            experts = slice(first, first := first + len(x))
            outputs.append(self._activate(x, experts, activation, share))
        return outputs

    def _share(self) -> float | Tensor:
        """Count a batch and return its weight in the running statistics."""
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        return 1 / self.num_batches_tracked if self.momentum is None else self.momentum

    def _activate(
        self, x: Tensor, experts: slice, activation: str, share: float | Tensor | None
    ) -> Tensor:
        assert self.running_mean is not None
        assert self.running_var is not None
        affine = self.weight[experts], self.bias[experts]
        running = self.running_mean[experts], self.running_var[experts]
        if not self.training:
            return norm_act(x, *affine, *running, activation=activation, eps=self.eps)[0]
        if num_ranks(self.group) == 1:
            if x.shape[1] < 2:
                raise ValueError(
                    "batch normalization needs more than 1 row in training, got a batch of"
                    f" {x.shape[1]}: drop the last, small batch"
                )
            y, mean, variance = norm_act(x, *affine, activation=activation, eps=self.eps)
            count: float | Tensor = float(x.shape[1])
        else:
            exact = x.to(accumulation_dtype(x))
            mean, variance, count = statistics_of_ranks(exact, [1], self.group)
            used = (t.view(affine[0].shape).to(exact.dtype) for t in (mean, variance))
            y, mean, variance = norm_act(x, *affine, *used, activation=activation, eps=self.eps)
        if share is not None:
            _track(running, (mean.detach(), variance.detach()), count, share)
        return y


def _track(
    running: tuple[Tensor, Tensor],
    new: tuple[Tensor, Tensor],
    count: float | Tensor,
    share: float | Tensor,
) -> None:
    """Move the running statistics; a batch that is empty on all ranks moves nothing."""
    unbiased: float | Tensor
    if isinstance(count, Tensor):
        share = share * (count > 0).to(count)
        unbiased = count / (count - 1).clamp(min=1)
    else:
        unbiased = count / max(count - 1, 1)
    for buffer, value in zip(running, (new[0], new[1] * unbiased), strict=True):
        buffer += (share * (value - buffer)).to(buffer.dtype)
