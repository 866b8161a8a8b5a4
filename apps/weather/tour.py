"""The weather stop of the tour: assimilate into real ERA5 fields with the shipped network."""

from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from apps.weather.networks import WEIGHTS
from harness.evidence import Interval, Resamples, moments, root_ratio
from harness.experiment import Figures, Run
from harness.experiment.run import CHOICES
from harness.report.page import Page, TourRow, TourStop
from weather.baselines.assimilator import Assimilator
from weather.data.shipped import ATTRIBUTION
from weather.experiments.ensemble.ensemble_sample import EnsembleTask, ensemble_methods
from weather.experiments.ensemble.source import Era5EnsembleSource
from weather.experiments.experiment import choice_name, stored
from weather.models.adas.analysis import AnalysisForm
from weather.plots import analysis_figure

CONFIG, DENSITY, TASK = Path("era5_ensemble.yaml"), 0.1, "persistence/0.1"
FORM = "adas_increment"
METHODS, TUNED = ("background", "inverse_distance", "oi"), ("inverse_distance", "oi")
FIELDS = (("geopotential", 500), ("temperature", 850))


def tour(folder: Path, say: Callable[[str], None], *, truths: int = 9) -> TourStop:
    """Analyze 2 January 2017 from a background twelve hours old and 10 % noisy observations.

    Args:
        folder: For files; none are needed.
        say: Reports the progress.
        truths: Number of members of which each is once the truth, from the last one backwards.
    """
    run = Run(folder, app="weather", config_path=CONFIG, package="weather")
    source = Era5EnsembleSource()
    methods = _classical(source, run)
    store = run.store(WEIGHTS, AnalysisForm())
    assert store.shipped is not None
    network = store.form.load(store.shipped / f"{FORM}-s0")
    methods[FORM] = network.expecting(source.task_background_sd["persistence"])
    cases = source.cases("persistence")[-truths:]  # of the nine members at 12 UTC
    errors: dict[str, Tensor] = {}
    example: dict[str, Tensor] = {}
    task = EnsembleTask("persistence", DENSITY)
    for name, method in methods.items():
        analyses = [source.situation(task, case).analyze(method) for case in cases]
        example[name] = analyses[-1]
        squares = [(a - c.truth).square() for a, c in zip(analyses, cases, strict=True)]
        errors[name] = source.grid.area_mean(torch.stack(squares))
        say(f"{name}: {len(cases)} analyses")
    rows = [_row(source, errors, field) for field in FIELDS]

    def draw(page: Page) -> None:
        page.text(
            "Truth is a member of the ERA5 ensemble on 2 January 2017, 12 UTC; the background is "
            "another member twelve hours earlier. Ten percent of the grid points report all four "
            "fields with errors of 50 m² s⁻² and 0.7 K. The network was trained on 1 January. OI "
            "is optimal interpolation. Intervals are over members at this one time: they speak of "
            "no other weather."
        )
        header = ["method", *source.channels.labels]
        table = [[name, *error.mean(0).sqrt().tolist()] for name, error in errors.items()]
        page.table(header, table, f"RMSE over {len(cases)} truths, m² s⁻² and K")
        for name in (FORM, "oi"):
            page.figure(_figure(source, example[name], name), f"{name}, member 9 is the truth")
        page.text(ATTRIBUTION)

    return TourStop("Weather: assimilation into ERA5", rows, draw)


def _classical(source: Era5EnsembleSource, run: Run) -> dict[str, Assimilator]:
    found = {m.name: m for m in ensemble_methods(source, "persistence") if m.name in METHODS}
    store, settings = run.store(CHOICES, Figures()), {}
    assert store.shipped is not None
    for name in TUNED:
        choice = store.form.load(store.shipped / f"{name}-task-{TASK.replace('/', '_')}-s0")
        settings[choice_name(name, TASK)] = choice["setting"]
    return {name: found[name].build(stored(settings, found[name], TASK)) for name in METHODS}


def _row(source: Era5EnsembleSource, errors: dict[str, Tensor], field: tuple[str, int]) -> TourRow:
    channel = source.channels.index(*field)
    label = source.channels.labels[channel]
    ratio = _ratio(errors[FORM], errors["background"], channel)
    oi = _ratio(errors["oi"], errors["background"], channel)
    return TourRow(
        "FengWu-Adas (increment)",
        f"RMSE of {label} over background",
        f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]",
        f"OI {oi.value:.2f}",
        f"{'better than' if ratio.high < 1 else 'not shown to beat'} the background, "
        f"{ratio.value / oi.value:.2f} x OI",
        ratio.high < 1 and ratio.value < oi.value,
    )


def _ratio(own: Tensor, other: Tensor, channel: int) -> Interval:
    pairs = torch.stack((own[:, channel], other[:, channel]), 1)
    return Resamples.clusters(range(len(own))).intervals(moments(pairs, root_ratio))["value"]


def _figure(source: Era5EnsembleSource, analysis: Tensor, name: str) -> Figure:
    channel = source.channels.index("geopotential", 500)
    case = source.cases("persistence")[-1]
    return analysis_figure(
        case.truth[channel],
        case.background[channel],
        analysis[channel],
        source.grid,
        variable="geopotential",
        level=500,
        observed=source.observe_case("persistence", case, DENSITY).mask.any(0),
        title=f"{name}: geopotential at 500 hPa",
    )
