"""The classical methods on the ERA5 ensemble sample, with the boxes in which they are tuned."""

from __future__ import annotations

from weather.baselines.free_run import FreeRun
from weather.baselines.homogeneous import HomogeneousCovariance
from weather.baselines.inverse_distance import InverseDistance
from weather.baselines.letkf import LETKF
from weather.baselines.optimal_interpolation import OptimalInterpolation
from weather.experiments.ensemble.sample import EnsembleSample, Task
from weather.experiments.method import Box, Method, Setting

MEMBERS = 9
_LETKF_BOXES: dict[Task, Box] = {
    # Half a day of weather is some twenty times the spread of the analyses.
    "persistence": {"length_km": (300.0, 2000.0), "inflation": (1.0, 300.0)},
    "ensemble": {"length_km": (200.0, 1500.0), "inflation": (0.5, 4.0)},
}


def ensemble_methods(source: EnsembleSample, task: Task) -> list[Method]:
    """Return every classical method for a task; the background comes first."""
    grid, errors = source.grid, source.errors(task)
    variables = [name for name, _ in source.channels]
    same_variable = [[float(row == column) for column in variables] for row in variables]

    def optimal_interpolation(setting: Setting) -> OptimalInterpolation:
        covariance = HomogeneousCovariance.from_samples(
            errors, grid, length_km=setting["length_km"]
        )
        return OptimalInterpolation(covariance, scale=setting["scale"])

    def letkf(setting: Setting) -> LETKF:
        return LETKF(
            grid,
            MEMBERS,
            localization_km=setting["length_km"],
            inflation=setting["inflation"],
            coupling=same_variable,
        )

    return [
        Method("background", lambda _: FreeRun()),
        Method(
            "inverse_distance",
            lambda s: InverseDistance(grid, power=s["power"], background_km=s["background_km"]),
            {"power": (1.0, 6.0), "background_km": (100.0, 5000.0)},
        ),
        Method(
            "inverse_distance_of_observations",
            lambda s: InverseDistance(grid, of="observations", power=s["power"]),
            {"power": (1.0, 6.0)},
        ),
        Method("oi", optimal_interpolation, {"length_km": (300.0, 3000.0), "scale": (0.3, 3.0)}),
        Method("letkf", letkf, _LETKF_BOXES[task], members=MEMBERS),
    ]
