"""Weights of tasks: fixed, uncertainty, GradNorm, DWA; PCGrad."""

import difflib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from core_gates.collectives import num_ranks
from core_gates.errors import GatesError, check_at_least, check_positive

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


BALANCERS: dict[str, type[Balancer]] = {
    "fixed": Fixed,
    "uncertainty": Uncertainty,
    "gradnorm": GradNorm,
    "dwa": DynamicWeightAverage,
    "pcgrad": PCGrad,
}
"""Name of every way to balance tasks -> its class."""


def check_balancing(name: str, options: Iterable[str]) -> None:
    """Refuse an unknown way to balance tasks, or an option that it does not have.

    Raises:
        GatesError: There is none of that name, or it has no such option.
    """
    if name not in BALANCERS:
        close = difflib.get_close_matches(name.lower(), BALANCERS, 1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise GatesError(f"balancing is {name!r}{hint}; choose one of {', '.join(BALANCERS)}")
    known = [
        p
        for p in inspect.signature(BALANCERS[name].__init__).parameters
        if p not in ("self", "num_tasks")
    ]
    if strangers := [option for option in options if option not in known]:
        has = f"only {', '.join(known)}" if known else "none"
        raise GatesError(f"balancing {name} has no option {strangers[0]!r}; it has {has}")


def balancer(name: str, options: Mapping[str, Any], num_tasks: int) -> Balancer:
    """Return a balancer.

    Args:
        name: One of :data:`BALANCERS`.
        options: Its options by name.
        num_tasks: Number of tasks T.

    Raises:
        GatesError: There is none of that name, or it has no such option or refuses a value.
    """
    check_balancing(name, options)
    try:
        return BALANCERS[name](num_tasks, **options)
    except (TypeError, ValueError) as error:
        raise GatesError(f"balancing {name}: {error}") from error
