"""Costs of a window of observations in control variables, and their minimization by autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from queue import SimpleQueue
from threading import Thread
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from scipy.optimize import minimize as scipy_minimize
from torch import Tensor

from weather.baselines.assimilator import Model
from weather.observations.gridded import GriddedObservations


class ControlVariable(Protocol):
    """A linear map U from control vectors of unit variance to increments of a state.

    Attributes:
        size: n = C H W, values of a flattened state.
        num_controls: k, values of a control vector.
    """

    size: int
    num_controls: int

    def increment(self, control: Tensor) -> Tensor:
        """Return ``U v`` (N, n) of control vectors (N, k), float64, differentiable."""
        ...


def adjoint_increment(control: ControlVariable, states: Tensor) -> Tensor:
    """Return ``U' x`` (N, k) of states (N, n), by autograd."""
    origin = states.new_zeros(len(states), control.num_controls).requires_grad_()
    with torch.enable_grad():
        (adjoint,) = torch.autograd.grad((control.increment(origin) * states).sum(), origin)
    return adjoint


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
        try:
            self._found = scipy_minimize(
                self._ask,
                np.zeros_like(self._first[1]),
                jac=True,
                method="L-BFGS-B",
                options=self._options,
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
        result = self._found
        norm = float(np.linalg.norm(result.jac))
        control = torch.from_numpy(np.asarray(result.x))
        return Minimum(control, float(result.fun), self._first[0], norm, int(result.nfev))


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
            answers = costs_and_gradients(
                costs, torch.from_numpy(np.stack([asked[row] for row in rows])), torch.tensor(rows)
            )
            for row, value, gradient in zip(rows, *answers, strict=True):
                workers[row].answers.put((value.item(), gradient.numpy()))
            asked.clear()


class Timed(NamedTuple):
    """Observations (N, C, H, W) at some hours after the start of a window."""

    hours: float
    observations: GriddedObservations


class Settings(NamedTuple):
    """How a cost is made and minimised.

    Attributes:
        scale: Factor on the background standard deviation.
        tolerance: The largest component of the gradient falls by this factor.
        max_iterations: Iterations after which a minimisation stops in any case.
    """

    scale: float
    tolerance: float
    max_iterations: int

    def check(self) -> None:
        """Refuse settings that are out of range.

        Raises:
            ValueError: The message names the setting.
        """
        if not self.scale > 0:
            raise ValueError(f"scale must be positive, got {self.scale}")
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance must lie between 0 and 1, got {self.tolerance}")
        if self.max_iterations < 1:
            raise ValueError(f"max_iterations must be at least 1, got {self.max_iterations}")


class WindowCost:
    """``J(v) = |v|**2 / 2 + sum over times of |(y - H M(x_b + s U v)) / sigma_o|**2 / 2``.

    The control variable v of strong-constraint 4D-Var (Le Dimet and Talagrand 1986; Courtier et
    al. 1994) describes the state at the start of a window, from which the model M, without error,
    leads to the times of the observations. With all of them at the start it is 3D-Var (Lorenc
    1986). There are N independent costs; all arithmetic is float64.

    Args:
        control: The square root U of the background-error covariance.
        scale: s, factor on the background standard deviation.
        start: x_b (N, C, H, W) at the start of the window.
        observed: Observations by ascending time.
        forecast: The model; None where all times are 0.
    """

    def __init__(
        self,
        control: ControlVariable,
        scale: float,
        start: Tensor,
        observed: Sequence[Timed],
        forecast: Model | None = None,
    ) -> None:
        self.control, self.scale, self.start = control, scale, start.double()
        self.observed = [(hours, fields.to(torch.float64)) for hours, fields in observed]
        self.forecast = forecast

    def state(self, controls: Tensor, rows: Tensor) -> Tensor:
        """Return states (R, C, H, W) at the start for control vectors (R, k) of rows (R,)."""
        start = self.start[rows]
        return start + self.scale * self.control.increment(controls).view_as(start)

    def __call__(self, controls: Tensor, rows: Tensor) -> Tensor:
        """Return J (R,) for control vectors (R, k) of rows (R,)."""
        state, now = self.state(controls, rows), 0.0
        total = 0.5 * controls.square().sum(1)
        for hours, (values, errors) in self.observed:
            state, now = self.advanced(state, hours - now), hours
            departures = (values[rows] - state) / errors[rows]  # 0 where the error is infinite
            total = total + 0.5 * departures.square().flatten(1).sum(1)
        return total

    def advanced(self, state: Tensor, hours: float) -> Tensor:
        """Return states (R, C, H, W) some hours later."""
        if hours == 0 or self.forecast is None:
            return state
        return self.forecast(state, hours)

    def analyze(self, hours: float, settings: Settings) -> Tensor:
        """Return the states (N, C, H, W) at the end of a window for the minimum of every cost.

        A row is NaN if its minimisation does not lower the cost.

        Args:
            hours: Length of the window.
            settings: How to minimise.
        """
        rows = torch.arange(len(self.start))
        minima = minimize_each(
            self,
            len(rows),
            self.control.num_controls,
            tolerance=settings.tolerance,
            max_iterations=settings.max_iterations,
        )
        controls = torch.stack([minimum.control for minimum in minima])
        lower = torch.tensor([minimum.cost <= minimum.start_cost for minimum in minima])
        with torch.no_grad():
            states = self.advanced(self.state(controls, rows), hours)
        return states.masked_fill(~lower[:, None, None, None], torch.nan)
