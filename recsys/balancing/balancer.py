"""What all ways to balance tasks have in common.

T tasks.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from core_gates.collectives import num_ranks

Shared = Sequence[tuple[nn.Parameter, slice]]
"""Parameters that tasks share, each with its shared rows."""


class Balancer(nn.Module, ABC):
    """From the losses of tasks to the scalar whose gradient is followed.

    A balancer is called once for each batch. State lives in buffers and is saved with the model.

    Args:
        num_tasks: Number of tasks T.

    Attributes:
        needs_shared: Whether it reads ``shared``, all parameters that tasks share.
    """

    needs_shared = False

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.num_tasks = num_tasks

    @abstractmethod
    def forward(
        self,
        losses: Tensor,
        last: Shared = (),
        shared: Shared = (),
        counted: Tensor | None = None,
    ) -> Tensor:
        """Return the scalar to be minimized.

        Args:
            losses: Losses (T,), times the weights of the tasks.
            last: Parameters of the last layer that all tasks share.
            shared: All parameters that tasks share.
            counted: True (T,) where a task counts in the batch, on any rank; where it does not, a
                loss of 0 says nothing. None: where the mean loss of the ranks is not 0.
        """

    @property
    @abstractmethod
    def weights(self) -> Tensor:
        """Present weight of each loss (T,), without gradient."""

    def end_epoch(self) -> None:
        """React to the end of an epoch; nothing by default."""


def mean_of_ranks(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mean of values over the ranks, a copy without gradient; all ranks must call it."""
    mean = values.detach().to(dtype, copy=True)
    if num_ranks() > 1:
        torch.distributed.all_reduce(mean)
        mean /= num_ranks()
    return mean


def where_counted(losses: Tensor, counted: Tensor | None) -> Tensor:
    """Return ``counted``, or if that is None where the losses of all ranks (T,) are not 0."""
    return mean_of_ranks(losses, losses.dtype) != 0 if counted is None else counted


def flat_gradient(loss: Tensor, shared: Shared) -> Tensor:
    """Return the gradient (P,) of a loss at the shared rows of parameters; the graph is kept."""
    parameters = [parameter for parameter, _ in shared]
    grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    parts = [
        (torch.zeros_like(parameter) if grad is None else grad)[rows].flatten()
        for grad, (parameter, rows) in zip(grads, shared, strict=True)
    ]
    return torch.cat(parts)
