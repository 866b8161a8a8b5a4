"""Minimisation of costs whose gradients autograd supplies."""

from __future__ import annotations

from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize as scipy_minimize
from torch import Tensor

CORRECTIONS = 30
"""Pairs of steps and gradients from which L-BFGS models the curvature."""

Costs = Callable[[Tensor, Tensor], Tensor]
"""Control vectors (R, k), float64, of some rows (R,) to their costs (R,)."""


class Minimum(NamedTuple):
    """Where a minimisation stopped.

    Attributes:
        control: (k,) float64.
        cost: J there.
        start_cost: J at the origin.
        gradient_norm: Length of the gradient. Of a cost ``|v|**2 / 2`` plus a convex term it is an
            upper bound of the distance to the minimiser.
        evaluations: Costs and gradients that were computed.
    """

    control: Tensor
    cost: float
    start_cost: float
    gradient_norm: float
    evaluations: int


def costs_and_gradients(costs: Costs, controls: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the costs (R,) of some rows (R,) and their gradients (R, k)."""
    points = controls.detach().clone().requires_grad_()
    with torch.enable_grad():
        values = costs(points, rows)
        (gradients,) = torch.autograd.grad(values.sum(), points)
    return values.detach(), gradients


def minimize_each(
    costs: Costs, count: int, size: int, *, tolerance: float, max_iterations: int
) -> list[Minimum]:
    """Minimise independent costs from the origin by L-BFGS (Liu and Nocedal 1989).

    Every row has its own minimisation by SciPy, with its own steps and end. Each waits in a thread
    until all have asked for a cost, and one call computes them together: a model integrates twenty
    states for the price of a few.

    Args:
        costs: The costs, differentiable.
        count: Rows N.
        size: k.
        tolerance: The largest component of a gradient falls by this factor.
        max_iterations: Iterations after which a minimisation stops in any case.
    """
    starts = costs_and_gradients(
        costs, torch.zeros(count, size, dtype=torch.float64), torch.arange(count)
    )
    requests: SimpleQueue[tuple[int, np.ndarray | None]] = SimpleQueue()
    workers = [
        _Worker(row, requests, start, tolerance, max_iterations)
        for row, start in enumerate(zip(*starts, strict=True))
    ]
    for worker in workers:
        worker.start()
    try:
        _serve(costs, workers, requests)
    except BaseException:
        for worker in workers:
            worker.answers.put(None)
        raise
    finally:
        for worker in workers:
            worker.join()
    return [worker.minimum() for worker in workers]


class _Worker(Thread):
    """The minimisation of one row."""

    def __init__(
        self,
        row: int,
        requests: SimpleQueue[tuple[int, np.ndarray | None]],
        start: tuple[Tensor, Tensor],
        tolerance: float,
        max_iterations: int,
    ) -> None:
        super().__init__(daemon=True)
        self.row, self.requests = row, requests
        self.answers: SimpleQueue[tuple[float, np.ndarray] | None] = SimpleQueue()
        self._first = (start[0].item(), start[1].numpy())
        self._options = {
            "maxcor": CORRECTIONS,
            "ftol": 0.0,
            "gtol": tolerance * float(np.abs(self._first[1]).max(initial=0.0)),
            "maxiter": max_iterations,
            "maxfun": 3 * max_iterations,
        }
        self._found: Any = None
        self._failure: BaseException | None = None

    def run(self) -> None:
        origin = np.zeros_like(self._first[1])
        try:
            self._found = scipy_minimize(
                self._ask, origin, jac=True, method="L-BFGS-B", options=self._options
            )
        except BaseException as error:
            self._failure = error
        self.requests.put((self.row, None))

    def _ask(self, control: np.ndarray) -> tuple[float, np.ndarray]:
        if not control.any():
            return self._first
        self.requests.put((self.row, control.copy()))
        answer = self.answers.get()
        if answer is None:
            raise RuntimeError("the costs of a minimisation cannot be computed")
        return answer

    def minimum(self) -> Minimum:
        """Return the result, once the thread has ended."""
        if self._failure is not None:
            raise self._failure
        found = self._found
        norm = float(np.linalg.norm(found.jac))
        control = torch.from_numpy(np.asarray(found.x))
        return Minimum(control, float(found.fun), self._first[0], norm, int(found.nfev))


def _serve(
    costs: Costs,
    workers: list[_Worker],
    requests: SimpleQueue[tuple[int, np.ndarray | None]],
) -> None:
    """Answer the rows that are still active, all of them at a time, until none is."""
    active, asked = len(workers), dict[int, np.ndarray]()
    while active:
        row, control = requests.get()
        if control is None:
            active -= 1
        else:
            asked[row] = control
        if asked and len(asked) == active:
            rows = sorted(asked)
            controls = torch.from_numpy(np.stack([asked[row] for row in rows]))
            found = costs_and_gradients(costs, controls, torch.tensor(rows))
            for row, value, gradient in zip(rows, *found, strict=True):
                workers[row].answers.put((value.item(), gradient.numpy()))
            asked.clear()
