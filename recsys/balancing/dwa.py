"""Weights by how fast each loss falls."""

import torch
from torch import Tensor

from core_gates.errors import check_at_least, check_positive
from recsys.balancing.balancer import Balancer, Shared, mean_of_ranks, where_counted


class DynamicWeightAverage(Balancer):
    """``Σ_t w_t L_t`` with ``w = T softmax(r / τ)`` and ``r_t = L_t(k-1) / L_t(k-2)`` (DWA).

    L_t(k) is the mean loss over those batches of period k in which the task counts, and r_t is 1
    where there are none in one of the two; in the first two periods all weights are 1 (Liu et al.,
    2019). A period is an epoch, or a number of batches where there is one epoch only. Losses are
    those of all ranks, and the buffers of ranks are equal after every batch:
    ``DistributedDataParallel`` gives all ranks those of the first.

    Args:
        num_tasks: Number of tasks T.
        tau: Temperature τ; large values make weights alike.
        period: Batches of a period; 0 for an epoch.

    Raises:
        ValueError: ``tau`` is not positive, or ``period`` is negative.
    """

    sums: Tensor
    means: Tensor
    counts: Tensor
    batches: Tensor
    periods: Tensor

    def __init__(self, num_tasks: int, *, tau: float = 2.0, period: int = 0) -> None:
        super().__init__(num_tasks)
        check_positive(tau=tau)
        check_at_least(0, period=period)
        self.tau, self.period = tau, period
        exact = torch.float64
        self.register_buffer("sums", torch.zeros(num_tasks, dtype=exact))
        self.register_buffer("counts", torch.zeros(num_tasks, dtype=torch.int64))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        # the newest first; 0 where a task did not count
        self.register_buffer("means", torch.ones(2, num_tasks, dtype=exact))
        self.register_buffer("periods", torch.zeros((), dtype=torch.int64))

    def forward(
        self,
        losses: Tensor,
        last: Shared = (),  # noqa: ARG002
        shared: Shared = (),  # noqa: ARG002
        counted: Tensor | None = None,
    ) -> Tensor:
        """Return the weighted sum of the losses (T,)."""
        total = self.weights.to(losses) @ losses
        if self.training:
            counted = where_counted(losses, counted)
            self.sums += mean_of_ranks(losses, self.sums.dtype).where(counted, 0)
            self.counts += counted
            self.batches += 1
            if self.period and self.batches == self.period:
                self._end_period()
        return total

    @property
    def weights(self) -> Tensor:
        """``T softmax(r / τ)`` (T,); ones in the first two periods."""
        if self.periods < 2:
            return torch.ones_like(self.sums)
        known = (self.means > 0).all(0)
        ratios = (self.means[0] / self.means[1]).where(known, 1)
        return self.num_tasks * (ratios / self.tau).softmax(0)

    def end_epoch(self) -> None:
        """End a period, if periods are epochs."""
        if not self.period and self.batches:
            self._end_period()

    def _end_period(self) -> None:
        mean = self.sums / self.counts.clamp(min=1)
        self.means.copy_(torch.stack([mean, self.means[0]]))
        self.sums.zero_()
        self.counts.zero_()
        self.batches.zero_()
        self.periods += 1
