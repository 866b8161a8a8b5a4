"""Weights that keep the gradients of all tasks of like size."""

import torch
from torch import Tensor

from core_gates.errors import GatesError, check_at_least, check_positive
from recsys.balancing.balancer import Balancer, Shared, flat_gradient, mean_of_ranks


class GradNorm(Balancer):
    """``Σ_t w_t L_t`` with weights learned at the last shared layer (Chen et al., 2018).

    With ``G_t = ‖∇ w_t L_t‖``, there, and relative training rates
    ``r_t = (L_t / L_t(0)) / mean_j(L_j / L_j(0))`` the weights follow the gradient of
    ``Σ_t |G_t - mean(G) r_t^α|``, whose second term is taken as constant, in units of the mean norm
    ``‖∇ L_t‖``, so that the scale of the losses does not matter; then they are scaled to the sum T.
    A batch is weighed by the weights before it has changed them.

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
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    def forward(
        self,
        losses: Tensor,
        last: Shared = (),
        shared: Shared = (),  # noqa: ARG002
        counted: Tensor | None = None,  # noqa: ARG002
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
            self._move(losses, last)
        return total

    @property
    def weights(self) -> Tensor:
        """The weights (T,), of sum T."""
        return self.current.detach()

    def _move(self, losses: Tensor, last: Shared) -> None:
        gradients = torch.stack([flat_gradient(loss, last) for loss in losses])
        gradients = mean_of_ranks(gradients, gradients.dtype)
        present = mean_of_ranks(losses, self.current.dtype)
        norms = gradients.norm(dim=1).to(self.current)
        self.first.copy_(torch.where(self.started, self.first, present))
        self.started.fill_(True)
        tiny = torch.finfo(present.dtype).tiny
        rates = present / self.first.clamp(min=tiny)
        rates = rates / rates.mean().clamp(min=tiny)
        g = self.current * norms
        slope = norms / norms.mean().clamp(min=tiny) * (g - g.mean() * rates**self.alpha).sign()
        moved = (self.current - self.learning_rate * slope).clamp(min=self.floor)
        self.current.copy_(moved * (self.num_tasks / moved.sum()))
