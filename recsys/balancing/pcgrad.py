"""Gradients without the parts in which tasks contradict each other."""

from collections.abc import Sequence

import torch
from torch import Tensor

from core_gates.errors import GatesError
from recsys.balancing.balancer import Balancer, Shared, flat_gradient


class PCGrad(Balancer):
    """``Σ_t L_t`` whose gradient at shared parameters is projected (Yu et al., 2020).

    The gradient of each task loses its component along that of every other task that it conflicts
    with, in random order; the results are summed. Each batch costs a backward pass per task.
    Embedding tables and a task's own parameters get the plain gradient; encoders of histories that
    tasks share are projected. Every rank projects the gradients of its rows.

    Args:
        num_tasks: Number of tasks T.
    """

    needs_shared = True

    def __init__(self, num_tasks: int) -> None:
        super().__init__(num_tasks)
        self.register_buffer("ones", torch.ones(num_tasks), persistent=False)
        self.ones: Tensor

    def forward(
        self,
        losses: Tensor,
        last: Shared = (),  # noqa: ARG002
        shared: Shared = (),
        counted: Tensor | None = None,  # noqa: ARG002
    ) -> Tensor:
        """Return the sum of the losses (T,), whose gradient is the projected one.

        Raises:
            GatesError: Tasks share no parameter.
        """
        if not self.training:
            return losses.sum()
        if not shared:
            raise GatesError(
                "PCGrad needs parameters that tasks share, but this network has none; choose "
                "another balancing"
            )
        gradients = torch.stack([flat_gradient(loss, shared) for loss in losses])
        change = project(gradients).sum(0) - gradients.sum(0)
        parts = change.split([p[rows].numel() for p, rows in shared])
        bends = [
            (p[rows] * part.view_as(p[rows])).sum()
            for (p, rows), part in zip(shared, parts, strict=True)
        ]
        bend = torch.stack(bends).sum()
        return losses.sum() + (bend - bend.detach())  # its value is 0, its gradient the change

    @property
    def weights(self) -> Tensor:
        """Ones (T,)."""
        return self.ones


def project(gradients: Tensor, orders: Sequence[Sequence[int]] | None = None) -> Tensor:
    """Return gradients (T, P) without the components that conflict with those of other tasks.

    ``g_i ← g_i - min(g_i·g_j, 0) g_j / ‖g_j‖²`` for all j ≠ i, one after the other, where g_j is
    the gradient before any projection.

    Args:
        gradients: Gradient of each task (T, P).
        orders: For each task the order of the others; drawn at random if None.
    """
    products = gradients @ gradients.mT  # of originals; those of projected ones follow from it
    squares = products.diagonal().clamp(min=torch.finfo(products.dtype).tiny)
    weights = torch.eye(len(gradients), dtype=gradients.dtype, device=gradients.device)
    for task in range(len(gradients)):
        drawn = torch.randperm(len(gradients)).tolist() if orders is None else orders[task]
        for other in drawn:
            if other != task:
                along = weights[task] @ products[:, other]
                weights[task, other] -= along.clamp(max=0) / squares[other]
    return weights @ gradients
