"""The sum of the losses."""

import torch
from torch import Tensor

from recsys.balancing.balancer import Balancer, Shared


class Fixed(Balancer):
    """``Σ_t L_t``: the weights are those of the tasks."""

    def __init__(self, num_tasks: int) -> None:
        super().__init__(num_tasks)
        self.register_buffer("ones", torch.ones(num_tasks), persistent=False)
        self.ones: Tensor

    def forward(
        self,
        losses: Tensor,
        last: Shared = (),  # noqa: ARG002
        shared: Shared = (),  # noqa: ARG002
        counted: Tensor | None = None,  # noqa: ARG002
    ) -> Tensor:
        """Return the sum of the losses (T,)."""
        return losses.sum()

    @property
    def weights(self) -> Tensor:
        """Ones (T,)."""
        return self.ones
