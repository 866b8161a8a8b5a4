"""The Held-Suarez run of dinosaur, a dynamical core in JAX, as a peer of ours.

The optional extra ``bench`` installs it (https://github.com/neuralgcm/dinosaur, Apache-2.0).
"""

import importlib.util
import os
from typing import Any, NamedTuple

from benchmarks.registry import Call

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
