"""Weights that keep the gradients of all tasks of like size."""

import torch
from torch import Tensor

from core_gates.errors import GatesError, check_at_least, check_positive
from recsys.balancing.balancer import (
    Balancer,
    Shared,
    flat_gradient,
    mean_of_ranks,
    where_counted,
)


class GradNorm(Balancer):
    """``Σ_t w_t L_t`` with weights learned at the last shared layer (Chen et al., 2018).

    With ``G_t = ‖∇ w_t L_t‖``, there, and relative training rates
    ``r_t = (L_t / L_t(0)) / mean_j(L_j / L_j(0))`` the weights follow the gradient of
    ``Σ_t |G_t - mean(G) r_t^α|``, whose second term is taken as constant, in units of the mean norm
    ``‖∇ L_t‖``, so that the scale of the losses does not matter; then they are scaled to the sum T.
    A batch is weighed by the weights before it has changed them.

    L_t(0) is the loss of the first batch in which the task counts. A batch in which it does not
    count says nothing of it: it is left out of all means, and its weight stays as it is.

    Args:
        num_tasks: Number of tasks T.
        alpha: α, how strongly slow tasks are pulled up.
        learning_rate: Of the weights.
        floor: Smallest weight before they are scaled.

    Raises:
        ValueError: An option is out of range.
    """

    current: Tensor
    first: Tensor
    started: Tensor

    def __init__(
        self,
        num_tasks: int,
        *,
        alpha: float = 1.5,
        learning_rate: float = 0.025,
        floor: float = 1e-3,
    ) -> None:
        super().__init__(num_tasks)
        check_at_least(0, alpha=alpha)
        check_positive(learning_rate=learning_rate, floor=floor)
        self.alpha, self.learning_rate, self.floor = alpha, learning_rate, floor
        self.register_buffer("current", torch.ones(num_tasks))
        self.register_buffer("first", torch.ones(num_tasks))
        self.register_buffer("started", torch.zeros(num_tasks, dtype=torch.bool))

    def forward(
        self,
        losses: Tensor,
        last: Shared = (),
        shared: Shared = (),  # noqa: ARG002
        counted: Tensor | None = None,
    ) -> Tensor:
        """Return the weighted sum of the losses (T,) and, in training, move the weights.

        Raises:
            GatesError: Tasks share no layer.
        """
        total = self.current.to(losses, copy=True) @ losses  # the weights are about to move
        if self.training:
            if not last:
                raise GatesError(
                    "GradNorm needs a layer that all tasks share, but this network has none; "
                    "choose another balancing"
                )
            self._move(losses, last, where_counted(losses, counted))
        return total

    @property
    def weights(self) -> Tensor:
        """The weights (T,), of sum T."""
        return self.current.detach()

    def _move(self, losses: Tensor, last: Shared, counted: Tensor) -> None:
        gradients = torch.stack([flat_gradient(loss, last) for loss in losses])
        gradients = mean_of_ranks(gradients, gradients.dtype)
        present = mean_of_ranks(losses, self.current.dtype)
        norms = gradients.norm(dim=1).to(self.current)
        self.first.copy_(present.where(counted & ~self.started, self.first))
        self.started |= counted
        tiny = torch.finfo(present.dtype).tiny
        rates = present / self.first.clamp(min=tiny)
        rates = rates / _mean(rates, counted).clamp(min=tiny)
        g = self.current * norms
        sizes = norms / _mean(norms, counted).clamp(min=tiny)
        slope = sizes * (g - _mean(g, counted) * rates**self.alpha).sign()
        moved = (self.current - self.learning_rate * slope).clamp(min=self.floor)
        rest = self.num_tasks - self.current.where(~counted, 0).sum()
        moved = moved * (rest / moved.where(counted, 0).sum().clamp(min=tiny))
        self.current.copy_(moved.where(counted, self.current))


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    return values.where(counted, 0).sum() / counted.sum().clamp(min=1)
