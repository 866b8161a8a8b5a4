"""The weather stop of the tour: one timeline, analyzed by interpolation and its correction."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from harness.experiment import Figures, Run
from harness.experiment.run import CHOICES
from harness.report.page import Page, TourRow, TourStop, TourTask
from weather.baselines.assimilator import Assimilator
from weather.cycle import Cycle
from weather.experiments.experiment import choice_name, stored
from weather.experiments.osse.osse_experiment import CONFIGURATION, OsseExperiment
from weather.experiments.osse.rivals import INTERPOLATION
from weather.experiments.osse.sealed_world import OsseWorld
from weather.experiments.twin.scenarios import OsseTask, observed
from weather.metrics import rmse
from weather.models.shallow_water.model import ShallowWater
from weather.plots import analysis_figure, cycle_figure

CONFIG, DENSITY = Path(f"{CONFIGURATION}.yaml"), 0.1
SAME = 0.005  # of a ratio, the last digit that is shown
SPARSE = 1.17  # of the error of interpolation, at 1 % of points, cycled like this
FREE, GATED, UNGATED = "free_run", "adas_oi", "ungated_oi"
METHODS = (FREE, INTERPOLATION, UNGATED, GATED)


def tour(
    folder: Path,
    say: Callable[[str], None],
    *,
    cycles: int = 100,
    spin_up_days: float = 30.0,
    members: int = 8,
) -> TourStop:
    """Analyze one timeline of stirred shallow water every six hours, from 10 % noisy observations.

    Args:
        folder: For the nature run and recorded errors.
        say: Reports the progress.
        cycles: Of the timeline, and of the training members.
        spin_up_days: Of nature.
        members: Of which background errors are recorded.
    """
    world = OsseWorld(
        ShallowWater(stirring_seed=1), ShallowWater(stirring_seed=1, stirring=2e-10),
        str(folder / "nature.zarr"), cycles=cycles, num_tests=1, num_tuning=1, num_validation=1,
        num_training=members, spin_up_days=spin_up_days,
    )  # fmt: skip
    experiment = OsseExperiment(world, str(folder), densities=(DENSITY,))
    task, recorded = experiment.tasks()[0], experiment.recorded()
    say("running nature")
    world.make()
    for turn in recorded.missing(task.base):
        say(f"recording background errors, turn {turn} of 2")
        recorded.make(task.base, turn)
    errors: dict[str, Tensor] = {}
    for name, method in _methods(folder, experiment, task).items():
        say(f"{cycles} analyses: {name}")
        errors[name], *last = _cycle(world, task, method)
    late = {name: own[cycles // 3 :].square().mean(0).sqrt() for name, own in errors.items()}
    heights = {name: float(own[0]) for name, own in late.items()}
    done = TourTask(
        f"analyze {cycles / 4:.0f} days of a simulated atmosphere from noisy reports",
        f"geopotential errs by {heights[GATED]:.1f} m² s⁻², optimal interpolation by"
        f" {heights[INTERPOLATION]:.1f}, without reports {heights[FREE]:.0f}",
        "gates weather assimilate",
    )
    rows = [_row(late, rival) for rival in (INTERPOLATION, UNGATED)]
    draw = partial(_draw, world=world, errors=errors, late=late, last=last)
    return TourStop("Weather: analyses of one timeline", rows, draw, [done])


def _draw(
    page: Page,
    world: OsseWorld,
    errors: dict[str, Tensor],
    late: dict[str, Tensor],
    last: list[Tensor],
) -> None:
    """Show errors over time, the last background and analysis of ``adas_oi``, and mean errors."""
    curves = {name: own[:, 0].numpy() for name, own in errors.items()}
    page.figure(
        cycle_figure(curves, label="Error of the analyzed geopotential", unit="m² s⁻²",
                     spin_up=len(errors[GATED]) // 3),
        "A made-up atmosphere is estimated every six hours from noisy reports. Errors of the "
        "estimates along one timeline; the free run sees no report.",
        name="cycles",
    )  # fmt: skip
    page.figure(
        analysis_figure(
            world.truth("test")[-1, 0, 0], last[0][0], last[1][0], world.grid,
            variable="geopotential", level=None, observed=world.networks("test", DENSITY)[0],
            title=f"{GATED}: the last analysis",
        ),
        "Truth, the forecast before the analysis, and the analysis; below, what it changed, and "
        "the errors of both.",
        name="analysis",
    )  # fmt: skip
    rows, columns = world.grid.shape
    page.text(
        f"Nature is a shallow-water model, stirred at random, on {rows} x {columns} points, run "
        "just now. A tenth of them report geopotential and wind, with errors of 10 m² s⁻² and 1 "
        "m s⁻¹. `oi` is optimal interpolation with the covariance of background errors recorded "
        "just now; `adas_oi` adds a network with gates that know how certain each report is, and "
        "`ungated_oi` the same network without gates. Networks and settings ship with the "
        "package.\n\n"
        "**One timeline decides nothing.** A tenth was chosen after tries with reports from one "
        f"point in a hundred: `adas_oi` erred by {SPARSE} of `oi` with errors recorded over 12 "
        "timelines, and over 8, as here, `oi` itself failed. The settings were chosen for more "
        "timelines, and longer ones. "
        f"`gates weather evaluate --config {CONFIGURATION}` takes sixteen, at both densities."
    )
    page.table(
        ["method", *world.channels.labels],
        [[name, *own.tolist()] for name, own in late.items()],
        "Root-mean-square error after the first third, m² s⁻² and m s⁻¹",
    )


def _methods(folder: Path, experiment: OsseExperiment, task: OsseTask) -> dict[str, Assimilator]:
    """Return the methods with the settings that ship."""
    run = Run(folder, app="weather", config_path=CONFIG, package="weather")
    store, settings = run.store(CHOICES, Figures()), {}
    assert store.shipped is not None
    for path in store.shipped.glob(f"*-task-{task.chosen_for.replace('/', '_')}-s0"):
        name = choice_name(path.name.partition("-task-")[0], task.chosen_for)
        settings[name] = store.form.load(path)["setting"]
    known = {method.name: method for method in experiment.methods(task.name)}
    return {name: known[name].build(stored(settings, known[name], task.name)) for name in METHODS}


def _cycle(world: OsseWorld, task: OsseTask, method: Assimilator) -> list[Tensor]:
    """Return the errors (T,C) of analyses, the last background and its analysis (C,H,W)."""
    cycle = Cycle(world.forecast(task.model), method, world.hours)
    weights, errors = world.grid.area_weights(), []
    with torch.no_grad():
        steps = cycle.run(world.first_background("test"), observed(task, world, "test", [0]))
        for truth, step in zip(world.truth("test"), steps, strict=False):
            errors.append(rmse(step.analysis[:, 0], truth, weights)[0])
    return [torch.stack(errors), step.background[0, 0], step.analysis[0, 0]]


def _row(late: dict[str, Tensor], rival: str) -> TourRow:
    ratio = float((late[GATED] / late[rival]).log().mean().exp())
    part = "a network with gates" if rival == INTERPOLATION else "gates in the network"
    words = (
        "as much error as"
        if abs(ratio - 1) < SAME
        else f"{'less' if ratio < 1 else 'more'} error than"
    )
    return TourRow(
        "Corrected interpolation",
        f"what {part} adds to {rival}",
        f"{ratio:.2f} of its error",
        f"geopotential {late[GATED][0]:.2f} against {late[rival][0]:.2f} m² s⁻²",
        f"{words} {rival} here; one timeline decides nothing",
    )
