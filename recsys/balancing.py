"""How losses of tasks become one: their sum, uncertainty weights, PCGrad."""

import difflib
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from core_gates.collectives import num_ranks
from core_gates.errors import GatesError

Shared = Sequence[tuple[nn.Parameter, slice]]
"""Parameters that tasks share, each with its shared rows."""


class Balancer(nn.Module, ABC):
    """From the losses of tasks to the scalar whose gradient is followed.

    A balancer is called once for each batch.

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
        shared: Shared = (),
        counted: Tensor | None = None,
    ) -> Tensor:
        """Return the scalar to be minimized.

        Args:
            losses: Losses (T,), times the weights of the tasks.
            shared: All parameters that tasks share.
            counted: True (T,) where a task counts in the batch, on any rank; where it does not, a
                loss of 0 says nothing. None: where the mean loss of the ranks is not 0.
        """

    @property
    @abstractmethod
    def weights(self) -> Tensor:
        """Present weight of each loss (T,), without gradient."""


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


class Fixed(Balancer):
    """``Σ_t L_t``: the weights are those of the tasks."""

    def __init__(self, num_tasks: int) -> None:
        super().__init__(num_tasks)
        self.register_buffer("ones", torch.ones(num_tasks), persistent=False)
        self.ones: Tensor

    def forward(
        self,
        losses: Tensor,
        shared: Shared = (),  # noqa: ARG002
        counted: Tensor | None = None,  # noqa: ARG002
    ) -> Tensor:
        """Return the sum of the losses (T,)."""
        return losses.sum()

    @property
    def weights(self) -> Tensor:
        """Ones (T,)."""
        return self.ones


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


class PCGrad(Fixed):
    """``Σ_t L_t`` whose gradient at shared parameters is projected (Yu et al., 2020).

    The gradient of each task loses its component along that of every other task that it conflicts
    with, in random order; the results are summed. Each batch costs a backward pass per task.
    Embedding tables and a task's own parameters get the plain gradient; encoders of histories that
    tasks share are projected. Every rank projects the gradients of its rows.

    Args:
        num_tasks: Number of tasks T.
    """

    needs_shared = True

    def forward(
        self,
        losses: Tensor,
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


BALANCERS: dict[str, type[Balancer]] = {
    "fixed": Fixed,
    "uncertainty": Uncertainty,
    "pcgrad": PCGrad,
}
"""Name of every way to balance tasks -> its class."""


def check_balancing(name: str) -> None:
    """Refuse an unknown way to balance tasks.

    Raises:
        GatesError: There is none of that name.
    """
    if name not in BALANCERS:
        close = difflib.get_close_matches(name.lower(), BALANCERS, 1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise GatesError(f"balancing is {name!r}{hint}; choose one of {', '.join(BALANCERS)}")


def balancer(name: str, num_tasks: int) -> Balancer:
    """Return a balancer.

    Args:
        name: One of `BALANCERS`.
        num_tasks: Number of tasks T.

    Raises:
        GatesError: There is none of that name.
    """
    check_balancing(name)
    return BALANCERS[name](num_tasks)
