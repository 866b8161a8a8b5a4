"""Weights that are learned as the uncertainty of each task."""

import torch
from torch import Tensor, nn

from recsys.balancing.balancer import Balancer, Shared, where_counted


class Uncertainty(Balancer):
    """``Σ_t e^{-s_t} L_t + s_t / 2`` with learned s (Kendall et al., 2018).

    At its optimum ``e^{s_t} = 2 L_t``. The s are parameters, trained with those of the network. The
    sum is over the tasks that count in the batch: the second term alone would only lower s.

    Args:
        num_tasks: Number of tasks T.
    """

    def __init__(self, num_tasks: int) -> None:
        super().__init__(num_tasks)
        self.log_variance = nn.Parameter(torch.zeros(num_tasks))

    def forward(
        self,
        losses: Tensor,
        last: Shared = (),  # noqa: ARG002
        shared: Shared = (),  # noqa: ARG002
        counted: Tensor | None = None,
    ) -> Tensor:
        """Return the scalar to be minimized, of the losses (T,)."""
        s = self.log_variance.to(losses.dtype)
        terms = (-s).exp() * losses + s / 2
        return terms.where(where_counted(losses, counted), 0).sum()

    @property
    def weights(self) -> Tensor:
        """``e^{-s}`` (T,)."""
        return (-self.log_variance.detach()).exp()
