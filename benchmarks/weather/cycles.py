"""Six-hour forecasts and analyses of the twin world as multiples of each other."""

import importlib.util
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from benchmarks.comparison import Call, Comparison, Load

ABSENT = "dinosaur is not installed: pip install 'gatesuite[bench]'"

_ONE_THREAD = {
    "JAX_PLATFORMS": "cpu",
    "NPROC": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
}


class HeldSuarezRun(NamedTuple):
    """A compiled run.

    Attributes:
        call: Runs the steps from the initial state and returns the last state of dinosaur.
        start: The initial state.
        temperature: Turns a state into the temperature (..., L, W, H), K.
    """

    call: Call
    start: Any
    temperature: Any


def is_installed() -> bool:
    """Return whether the peer can be imported."""
    return importlib.util.find_spec("dinosaur") is not None


def held_suarez_run(num_steps: int, *, members: int = 1) -> HeldSuarezRun:
    """Prepare T21 with eight layers and time steps of 1800 s on one thread, in float32.

    It has the default transform, the time stepping (three evaluations of the tendencies a step) and
    the filter that dinosaur recommends for this test. JAX must not be imported before.

    Args:
        num_steps: Time steps of a call.
        members: Runs at once, as one batch.
    """
    for name, value in _ONE_THREAD.items():
        os.environ.setdefault(name, value)
    import jax
    from dinosaur import (
        coordinate_systems,
        held_suarez,
        primitive_equations,
        primitive_equations_states,
        scales,
        sigma_coordinates,
        spherical_harmonic,
        time_integration,
        xarray_utils,
    )

    grid = spherical_harmonic.Grid.T21()
    coordinates = coordinate_systems.CoordinateSystem(
        horizontal=grid, vertical=sigma_coordinates.SigmaCoordinates.equidistant(8)
    )
    specs = primitive_equations.PrimitiveEquationsSpecs.from_si()
    make_state, features = primitive_equations_states.isothermal_rest_atmosphere(
        coordinates, specs, p1=5e3 * scales.units.pascal
    )
    reference = features[xarray_utils.REF_TEMP_KEY]
    orography = primitive_equations.truncated_modal_orography(
        features[xarray_utils.OROGRAPHY], coordinates
    )
    equations = time_integration.compose_equations(
        [
            primitive_equations.PrimitiveEquations(reference, orography, coordinates, specs),
            held_suarez.HeldSuarezForcing(coordinates, specs, reference),
        ]
    )
    time_step = specs.nondimensionalize(1800 * scales.units.second)
    step = time_integration.step_with_filters(
        time_integration.imex_rk_sil3(equations, time_step),
        [time_integration.exponential_step_filter(grid, time_step)],
    )
    run = time_integration.repeated(step, num_steps)
    keys = jax.random.split(jax.random.PRNGKey(0), members)
    start = jax.vmap(make_state)(keys) if members > 1 else make_state(keys[0])
    compiled = jax.jit(jax.vmap(run) if members > 1 else run)

    def temperature(state: Any) -> Any:
        return reference[:, None, None] + grid.to_nodal(state.temperature_variation)

    return HeldSuarezRun(lambda: jax.block_until_ready(compiled(start)), start, temperature)


HOURS = 6.0
MEMBERS = 20
SPIN_UP_HOURS = 24.0
UNIT, RATE = "member-day", "member-days/CPU-s"
DAYS = {"1 member": HOURS / 24, f"{MEMBERS} members": MEMBERS * HOURS / 24}
HELD_SUAREZ_STEPS = round(HOURS * 3600 / 1800)


def forecasts(model: nn.Module) -> dict[str, Call]:
    """Return forecasts of one and of twenty members, each with its new start from the grid."""
    return {name: _forecast(model, count) for name, count in zip(DAYS, (1, MEMBERS), strict=True)}


def comparisons() -> Iterator[Comparison]:
    """Forecasts of many members, then analyses against them; on one CPU thread."""
    yield shallow_water()
    yield held_suarez()
    yield multiples()
    yield cycles()


def shallow_water() -> Comparison:
    """Compare the time of a member in a batch of twenty with one alone; the bar is a quarter."""

    def build(load: Load) -> Mapping[str, Call]:
        return forecasts(load("weather.models.shallow_water.model").ShallowWater())

    return Comparison(
        name="shallow water T21, steps of 3600 s",
        op="shallow_water",
        build=build,
        baseline="1 member",
        bars={f"{MEMBERS} members": 0.25},
        units=DAYS,
        unit=UNIT,
        rate=RATE,
    )


def held_suarez() -> Comparison:
    """Return a member in a batch of twenty against one run of dinosaur; it may cost no more."""
    peer, peers = "dinosaur, 1 member", f"dinosaur, {MEMBERS} members"
    present = is_installed()

    def build(load: Load) -> Mapping[str, Call]:
        calls = forecasts(load("weather.models.held_suarez.model").HeldSuarez())
        if present:
            calls[peer] = held_suarez_run(HELD_SUAREZ_STEPS).call
            calls[peers] = held_suarez_run(HELD_SUAREZ_STEPS, members=MEMBERS).call
        return calls

    single, batch = DAYS
    return Comparison(
        name="Held-Suarez T21 L8, steps of 1800 s",
        op="held_suarez",
        build=build,
        baseline=peer,
        bars={batch: 1.0},
        units=DAYS | {peer: DAYS[single], peers: DAYS[batch]},
        unit=UNIT,
        rate=RATE,
        first_calls=(peer, peers),
        absent={} if present else {peer: ABSENT},
    )


def _forecast(model: nn.Module, members: int) -> Call:
    with torch.no_grad():
        state = model(model.initial_state(members, seed=0), SPIN_UP_HOURS)  # type: ignore[operator]

    def call() -> Tensor:
        with torch.no_grad():
            return cast(Tensor, model(state, HOURS))

    return call


DENSITY = 0.1
ERROR_SD = (10.0, 1.0, 1.0)
CLIMATE_SD = (300.0, 20.0, 20.0)
BACKGROUND_SD = (15.0, 1.0, 1.0)


def cycles() -> Comparison:
    """Return Adas against the LETKF with the ensemble forecast that it lives on.

    The bar: the analysis of Adas is at least five times cheaper. Adas with a forecast is shown too.
    """
    letkf = f"LETKF of {MEMBERS} with its ensemble forecast"
    return Comparison(
        name="analysis of 32x64 against a cycle of the LETKF",
        op="analysis",
        build=lambda load: _TwinWorld(load).cycles(letkf),
        baseline=letkf,
        bars={"Adas": 0.2},
    )


def multiples() -> Comparison:
    """Return every analysis alone as a multiple of one forecast."""
    return Comparison(
        name="analysis of 32x64, 10 % observed",
        op="analysis",
        build=lambda load: _TwinWorld(load).analyses(),
        baseline="forecast of 1 member",
    )


class _TwinWorld:
    """States, observations and methods; ``load`` imports them, of this or another revision."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.model = load("weather.models.shallow_water.model").ShallowWater()
        with torch.no_grad():
            states = self.model(self.model.initial_state(MEMBERS + 1, seed=0), 24.0)
        self.ensemble = states[None, 1:]  # (1, M, 3, H, W)
        network = load("weather.observations.simulated")
        self.observations = network.observe(
            states[:1],
            network.bernoulli_network(self.model.grid, DENSITY, seed=0),
            torch.tensor(ERROR_SD),
            generator=torch.Generator().manual_seed(0),
        )

    def analyses(self) -> Mapping[str, Call]:
        single, members = self.ensemble[:, :1], self.ensemble
        letkf, interpolation, adas = self._letkf(), self._interpolation(), self._adas()
        return {
            "forecast of 1 member": lambda: self._forecast(single),
            f"forecast of {MEMBERS} members": lambda: self._forecast(members),
            "optimal interpolation": lambda: interpolation.analyze(single, self.observations),
            "Adas": lambda: adas.analyze(single, self.observations),
            f"LETKF of {MEMBERS}": lambda: letkf.analyze(members, self.observations),
        }

    def cycles(self, letkf_name: str) -> Mapping[str, Call]:
        letkf, adas = self._letkf(), self._adas()

        def cycle(method: Any, background: Tensor) -> Call:
            def call() -> Tensor:
                return self._forecast(method.analyze(background, self.observations))

            return call

        single = self.ensemble[:, :1]
        return {
            letkf_name: cycle(letkf, self.ensemble),
            "Adas": lambda: adas.analyze(single, self.observations),
            "Adas with its forecast": cycle(adas, single),
        }

    @torch.no_grad()
    def _forecast(self, states: Tensor) -> Tensor:
        result: Tensor = self.model(states[0], HOURS)
        return result[None]

    def _letkf(self) -> Any:
        return self.load("weather.baselines.letkf").LETKF(
            self.model.grid, MEMBERS, localization_km=1500.0, inflation=1.05, relaxation=0.5
        )

    def _interpolation(self) -> Any:
        covariance = self.load("weather.baselines.covariance").SampleCovariance(
            self.ensemble[0], self.model.grid, localization_km=2500.0
        )
        module = self.load("weather.baselines.optimal_interpolation")
        return module.OptimalInterpolation(covariance, scale=0.05)

    def _adas(self) -> Any:
        network = self.load("weather.models.adas.presets").adas_preset("swe", output="increment")
        normalizer = self.load("weather.state").Normalizer(
            torch.tensor((10000.0, 0.0, 0.0)), torch.tensor(CLIMATE_SD)
        )
        module = self.load("weather.models.adas.analysis")
        return module.AdasAnalysis(network, normalizer, torch.tensor(BACKGROUND_SD)).eval()
