"""Six-hour forecasts of the spectral models, one member and twenty at once."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from benchmarks.registry import Call, Comparison, Load
from benchmarks.weather import dinosaur

HOURS = 6.0
MEMBERS = 20
SPIN_UP_HOURS = 24.0
UNIT, RATE = "member-day", "member-days/CPU-s"
DAYS = {"1 member": HOURS / 24, f"{MEMBERS} members": MEMBERS * HOURS / 24}
HELD_SUAREZ_STEPS = round(HOURS * 3600 / 1800)


def forecasts(model: nn.Module) -> dict[str, Call]:
    """Return forecasts of one and of twenty members, each with its new start from the grid."""
    return {name: _forecast(model, count) for name, count in zip(DAYS, (1, MEMBERS), strict=True)}


def shallow_water() -> Comparison:
    """Return what a member costs in a batch of twenty against alone; the bar is a quarter."""

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
    present = dinosaur.is_installed()

    def build(load: Load) -> Mapping[str, Call]:
        calls = forecasts(load("weather.models.held_suarez.model").HeldSuarez())
        if present:
            calls[peer] = dinosaur.held_suarez_run(HELD_SUAREZ_STEPS).call
            calls[peers] = dinosaur.held_suarez_run(HELD_SUAREZ_STEPS, members=MEMBERS).call
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
        absent={} if present else {peer: dinosaur.ABSENT},
    )


def _forecast(model: nn.Module, members: int) -> Call:
    with torch.no_grad():
        state = model(model.initial_state(members, seed=0), SPIN_UP_HOURS)  # type: ignore[operator]

    def call() -> Tensor:
        with torch.no_grad():
            return cast(Tensor, model(state, HOURS))

    return call
