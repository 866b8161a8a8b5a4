"""Three-dimensional variational analysis."""

import torch
from torch import Tensor

from weather.baselines.assimilator import check_shapes
from weather.baselines.variational.control import ControlVariable
from weather.baselines.variational.cost import Settings, Timed, WindowCost
from weather.observations.gridded import GriddedObservations


class ThreeDVar:
    """Minimise ``J(v) = |v|**2 / 2 + |(y - H (x_b + s U v)) / sigma_o|**2 / 2`` (Lorenc 1986).

    With ``B = U U'`` the minimiser is the analysis of optimal interpolation. Every timeline and
    member has its own minimisation, by L-BFGS with gradients of autograd.

    Args:
        control: The square root U of the background-error covariance.
        scale: s, factor on the background standard deviation.
        members: Ensemble size M; each member is analysed with the same observations.
        tolerance: The largest component of the gradient falls by this factor.
        max_iterations: Iterations after which a minimisation stops in any case.

    Raises:
        ValueError: A setting is out of range.
    """

    def __init__(
        self,
        control: ControlVariable,
        *,
        scale: float = 1.0,
        members: int = 1,
        tolerance: float = 1e-8,
        max_iterations: int = 500,
    ) -> None:
        self.settings = Settings(scale, tolerance, max_iterations)
        self.settings.check()
        self.control, self.members = control, members

    def analyse(self, background: Tensor, observations: GriddedObservations) -> Tensor:
        """Return the analysis; see `weather.baselines.assimilator.Assimilator`.

        A state that is no longer finite is returned as it is.

        Raises:
            ValueError: Shapes differ.
        """
        check_shapes(background, observations, self.control.size, self.members)
        analysis = background.clone()
        where = to_analyze(background, observations)
        if len(where[0]):
            fields = GriddedObservations(*(part[where[0]] for part in observations))
            cost = WindowCost(
                self.control, self.settings.scale, background[where], [Timed(0.0, fields)]
            )
            analysis[where] = finite_or(background[where], cost.analyze(0.0, self.settings))
        return analysis


def to_analyze(background: Tensor, observations: GriddedObservations) -> tuple[Tensor, ...]:
    """Return timeline and member of every finite state with an observation."""
    finite = background.flatten(2).isfinite().all(2)
    return (finite & observations.mask.flatten(1).any(1)[:, None]).nonzero(as_tuple=True)


def finite_or(states: Tensor, found: Tensor) -> Tensor:
    """Return what was found (N, C, H, W), in the type of the states, which stay where it is not."""
    found = found.to(states)
    kept = found.flatten(1).isfinite().all(1)[:, None, None, None]
    return torch.where(kept, found, states)
