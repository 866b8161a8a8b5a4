"""The methods of a world, with the boxes in which they are tuned, from the same recorded errors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from weather.baselines.assimilator import (
    Assimilator,
    Climatology,
    FreeRun,
    InverseDistance,
    Nudging,
    Persistence,
)
from weather.baselines.letkf import LETKF
from weather.baselines.optimal_interpolation import (
    CorrectedInterpolation,
    DampedInterpolation,
    OptimalInterpolation,
)
from weather.baselines.spectral_covariance import SpectralCovariance
from weather.baselines.variational import FourDVar, ThreeDVar
from weather.experiments.experiment import Box, Method, Setting
from weather.experiments.osse.recorded_errors import SPARSE, TURNS, RecordedErrors
from weather.experiments.osse.sealed_world import OsseWorld
from weather.experiments.twin.scenarios import OsseTask
from weather.models.adas.analysis import AdasAnalysis, Network
from weather.spherical import SphericalTransform

MEMBERS = 20
WINDOW_HOURS = 24.0
SCALE, LENGTH_KM = (0.01, 2.0), (500.0, 20_000.0)
TURN = (1.0, 4.0)  # of interpolation: the first recording below 2, the second above
FRACTIONS: tuple[Setting, ...] = tuple(
    {"alpha": alpha, "beta": beta}
    for alpha, beta in (
        (1.0, 0.0), (0.5, 0.5), (0.25, 0.75), (0.75, 0.25), (0.75, 0.75), (0.0, 1.0),
        (1.0, 0.5), (0.5, 1.0), (0.25, 0.5), (0.5, 0.25), (1.0, 0.25), (0.25, 1.0),
    )
)  # fmt: skip
"""Fractions of the increments that are tried for corrections: interpolation itself first."""

DAMPING: Box = {"relative_scale": (0.2, 5.0), "turn": [*TURNS], "alpha": (0.25, 1.0, 1.0)}
"""Scale over that of interpolation, which recorded errors, and fraction of the increment."""

SHARES = {"alpha": (0.25, 1.0), "beta": (0.25, 1.0)}
INTERPOLATION, DAMPED = "oi", "damped_oi"
FEW, FEW_CYCLES = 4, 120
FOUR_D_VAR = {"four_d_var_2": 2, "four_d_var_4": 4, "four_d_var_8": 8, "four_d_var": 20}
"""Iterations of 4D-Var by name, each tuned by itself."""

SLOWER = 5  # 4D-Var takes a second an analysis: tuned on a fifth of the cycles
COSTLY = {"four_d_var_2": 7, "four_d_var_4": 12, "four_d_var_8": 22, "four_d_var": 50, "letkf": 10}
"""Run on few timelines and cycles, where all others are compared with them; how many cycles of
interpolation on all timelines take the time of one of theirs."""

CORRECTIONS = {"adas_oi": "adas_increment", "ungated_oi": "ungated"}
"""Corrections of interpolation, and the form of the networks that they are made of."""

ALONE = ("adas_increment", "ungated")
NETWORKS = (*CORRECTIONS, *ALONE)
TAPERED = {f"{name}_tapered": name for name in NETWORKS}
"""The same where the increments of networks end with the reports, as `assimilate` has it."""

LoadNetwork = Callable[[str, int], AdasAnalysis]


class Rivals:
    """Builds the methods of a task.

    Args:
        world: The world that they work in.
        recorded: Errors that covariances are sampled from.
        load: Returns the network of a form and a seed.
    """

    def __init__(self, world: OsseWorld, recorded: RecordedErrors, load: LoadNetwork) -> None:
        self.world, self.recorded, self.load = world, recorded, load
        self._kept: dict[tuple[str, str], OptimalInterpolation] = {}

    def classical(self, task: OsseTask) -> list[Method]:
        """Return every method without a network, the free run first.

        All take part with fixed networks of reports, variational methods where they are sparse and
        what costs most with the perfect model there; in outages only interpolation does, and with
        mixed reports that of recorded errors.
        """
        free = Method("free_run", lambda _: FreeRun())
        interpolations = [
            Method("oi_day_differences", self._day_differences,
                   {"scale": SCALE, "length_km": LENGTH_KM}),
            self.optimal(task),
            Method(DAMPED, partial(self._damped, task), DAMPING, builds_on=self.optimal(task)),
        ]  # fmt: skip
        if task.reports == "outage":
            return [free, *interpolations]
        if task.reports != "fixed":
            return [free, *interpolations[1:]]
        costly = self._costly(task) if task.density < SPARSE else []
        return [free, *self._simple(task), *interpolations, *costly]

    def _simple(self, task: OsseTask) -> list[Method]:
        """Return methods without a covariance."""
        grid, hours, forecast = self.world.grid, self.world.hours, self.world.forecast(task.model)
        return [
            Method("climatology", lambda _: Climatology(self.world.climatology())),
            Method("persistence", lambda _: Persistence()),
            Method(
                "inverse_distance",
                lambda s: InverseDistance(grid, power=s["power"], background_km=s["background_km"]),
                {"power": (1.0, 6.0), "background_km": (100.0, 40_000.0)},
            ),
            Method(
                "nudging",
                lambda s: Nudging(grid, forecast, hours=hours, radius_km=s["radius_km"],
                                  relaxation_hours=s["relaxation_hours"]),
                {"relaxation_hours": (0.5, 50.0), "radius_km": (500.0, 6000.0)},
            ),
        ]  # fmt: skip

    def _costly(self, task: OsseTask) -> list[Method]:
        """Return 3D-Var and, with the perfect model, what costs tens of times as much."""
        three_d_var = Method("three_d_var", lambda s: ThreeDVar(self._spectral(task),
                             scale=s["scale"], tolerance=1e-3, max_iterations=30),
                             {"scale": SCALE})  # fmt: skip
        if task.model != "perfect":
            return [three_d_var]
        return [
            three_d_var,
            *(Method(name, partial(self._four_d_var, task, count), {"scale": SCALE})
              for name, count in FOUR_D_VAR.items()),
            Method(
                "letkf",
                lambda s: LETKF(self.world.grid, MEMBERS, localization_km=s["length_km"],
                                inflation=1 + s["excess"], relaxation=s["relaxation"]),
                {
                    "length_km": (500.0, 6000.0),
                    "excess": (0.005, 2.0),  # of the inflation over 1
                    "relaxation": (0.1, 0.99),
                },
                members=MEMBERS,
            ),
        ]  # fmt: skip

    def optimal(self, task: OsseTask) -> Method:
        """Return optimal interpolation with B of recorded errors."""
        box = {"scale": SCALE, "length_km": LENGTH_KM, "turn": TURN}
        return Method(INTERPOLATION, lambda s: self.interpolation(task, s), box)

    def _damped(self, task: OsseTask, setting: Setting) -> Assimilator:
        """Return a fraction of the increment of interpolation, which keeps its tuned length."""
        setting = setting | {"scale": setting["scale"] * setting["relative_scale"]}
        return DampedInterpolation(self.interpolation(task, setting), setting["alpha"])

    def _four_d_var(self, task: OsseTask, iterations: int, setting: Setting) -> Assimilator:
        return FourDVar(
            self._spectral(task), self.world.forecast(task.model), window_hours=WINDOW_HOURS,
            hours=self.world.hours, scale=setting["scale"], max_iterations=iterations,
        )  # fmt: skip

    def corrected(self, name: str, seed: int, task: OsseTask, *, tapered: bool = False) -> Method:
        """Return the correction of tuned interpolation by the network of a seed.

        Args:
            name: ``adas_oi`` or ``ungated_oi``.
            seed: Of the network.
            task: Whose recorded errors interpolation has.
            tapered: Whether the increment of the network ends with the reports.
        """

        def build(setting: Setting) -> Assimilator:
            return CorrectedInterpolation(
                self._network(name, seed, tapered=tapered),
                self.interpolation(task, setting),
                alpha=setting["alpha"],
                beta=setting["beta"],
            )

        return Method(name, build, SHARES, builds_on=self.optimal(task))

    def alone(self, form: str, seed: int, *, tapered: bool = False) -> Method:
        """Return a network without interpolation."""
        network = partial(self._network, form, seed, tapered=tapered)
        return Method(form, lambda _: CorrectedInterpolation(network()))

    def _network(self, name: str, seed: int, *, tapered: bool) -> Network:
        network = self.load(name, seed)
        return network.expecting(grid=self.world.grid) if tapered else network

    def interpolation(self, task: OsseTask, setting: Setting) -> Assimilator:
        """Return optimal interpolation with B of recorded errors, the same object at each call."""
        setting = {name: setting[name] for name in ("scale", "length_km", "turn")}
        key = (task.base.name, str(setting))
        if key not in self._kept:  # only one, whose covariance has 150 MB at T21
            self._kept.clear()
            covariance = self.recorded.covariance(task.base, turn_of(setting), setting["length_km"])
            self._kept[key] = OptimalInterpolation(covariance, scale=setting["scale"])
        return self._kept[key]

    def _day_differences(self, setting: Setting) -> Assimilator:
        covariance = self.world.background_covariance(setting["length_km"])
        return OptimalInterpolation(covariance, scale=setting["scale"])

    def _spectral(self, task: OsseTask) -> SpectralCovariance:
        rows, columns = self.world.grid.shape
        transform = SphericalTransform(2 * rows // 3, rows, columns)
        errors = self.recorded.recording(task.base, 2).errors[::4]
        return SpectralCovariance.from_samples(errors, transform, self.world.channels)


def turn_of(setting: Setting) -> int:
    """Return which recording of errors a setting of interpolation takes."""
    return 1 if setting["turn"] < 2 else 2
