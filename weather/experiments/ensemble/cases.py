"""Score methods on the cases of the ERA5 ensemble sample."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from weather.baselines.assimilator import Assimilator
from weather.cycle import CycleStep
from weather.experiments.departures import Departures, withheld_points
from weather.experiments.ensemble.sample import Case, EnsembleSample, Task
from weather.observations.gridded import GriddedObservations


def analyze_case(
    source: EnsembleSample, task: Task, case: Case, density: float, method: Assimilator
) -> Tensor:
    """Return the analysis (C,H,W) of one case, the mean if the method is an ensemble."""
    one = source.observe_case(task, case, density)
    observations = GriddedObservations.stack([one])
    single = method.members == 1
    background = case.background[None] if single else case.ensemble
    return method.analyse(background[None], observations)[0].mean(0)


def case_errors(
    source: EnsembleSample,
    task: Task,
    density: float,
    method: Assimilator,
    *,
    tuning: bool = False,
    cases: int | None = None,
    tick: Callable[[], None] = lambda: None,
) -> Tensor:
    """Return the mean square error (N,C) of the analysis of every case, or the first ``cases``."""
    squares = []
    for case in source.cases(task, tuning=tuning)[:cases]:
        analysis = analyze_case(source, task, case, density, method)
        squares.append(source.grid.area_mean((analysis - case.truth).square()))
        tick()
    return torch.stack(squares)


def case_departures(
    source: EnsembleSample,
    task: Task,
    density: float,
    method: Assimilator,
    *,
    cases: int | None = None,
    every: int = 6,
) -> Departures:
    """Return the departures from assimilated and withheld observations in every sixth case."""
    points = withheld_points(source.grid, 11)
    departures = Departures(points[None])
    for case in source.cases(task)[:cases][::every]:
        observations = GriddedObservations.stack([source.observe_case(task, case, density)])
        single = method.members == 1
        background = (case.background[None] if single else case.ensemble)[None]
        analysis = method.analyse(background, observations)
        departures.add(CycleStep(background, analysis, observations), method)
    return departures


def worst_case(errors: Tensor, background_sd: Tensor) -> float:
    """Return the largest error of any case, the mean over channels of RMSE over deviation."""
    return float((errors.sqrt() / background_sd).mean(1).max())
