"""A user's store as an experiment: problems, held-out times, and the scores on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from harness.evidence import Bar, Resamples, Scores, moments, root_ratio
from harness.files import Data, short_digest
from weather.baselines.assimilator import Assimilator, FreeRun, InverseDistance
from weather.baselines.covariance import HomogeneousCovariance, has_equal_steps
from weather.baselines.optimal_interpolation import IterativeInterpolation
from weather.data.climatology import read_climatology
from weather.data.training_cache import contiguous_block
from weather.experiments.cases import (
    QUICK_CASES,
    REFERENCE,
    CaseExperiment,
    CaseScores,
    Situation,
)
from weather.experiments.experiment import (
    DENSITIES,
    UNMEASURED,
    Load,
    Method,
    Setting,
    Settings,
    Task,
    Work,
    shown,
)
from weather.experiments.reanalysis.store_data import CLIMATOLOGY, ReanalysisData
from weather.metrics import joined
from weather.observations.gridded import GriddedObservations
from weather.observations.simulated import drawn_network, observe
from weather.progress import Tick, no_tick
from weather.training.stream import AssimilationBatch, generator

WITHOUT_REPORTS = 0.05  # of the training problems
ERROR_FACTORS = (0.5, 10.0)
VALIDATION_DENSITIES = (0.1, 0.01)

TUNING_CASES = 4
TOLERANCE = 1e-3  # of optimal interpolation: its errors are those of 1e-5 to four digits
PAIR_BYTES, MOST_PAIRS = 64 * 2**20, 64  # of background errors that covariances are estimated from
TABLE_BYTES = 2**30  # of the correlations between rows


class DensityTask(NamedTuple):
    """A density of observations on the held-out times."""

    density: float

    @property
    def name(self) -> str:
        """Name in settings and tables, such as ``0.1``."""
        return f"{self.density:.3g}"


class Case(NamedTuple):
    """A time to be scored: its position in the store, and that of its background."""

    truth: int
    background: int


CLIMATE = "climatology"
BLOCK = np.timedelta64(5, "D")


class ReanalysisScores(CaseScores[Case]):
    """Score every method, and the climatology, on held-out times."""

    source: ReanalysisSource
    others = (CLIMATE,)
    withheld = 21

    def scope(self, task: str) -> tuple[tuple[str, str | int], ...]:
        """Return how many times there are."""
        return (("times", len(self.cases(task))),)

    def compute(self, work: Work, tick: Tick = no_tick) -> dict[str, Tensor]:
        """Return the errors (seeds,N,C) of a method on a task, and its departures, by name."""
        if work.method != CLIMATE:
            return super().compute(work, tick)
        squares = []
        for case in self.cases(work.task):
            error = self.source.climatology(case) - self.source.truth[case.truth]
            squares.append(self.source.grid.area_mean(error.square()))
            tick()
        return {"errors": torch.stack(squares)[None]}

    def draws(self, task: str) -> Resamples:
        """Draw blocks of five days: what follows each other closely is not independent."""
        times = self.source.times[[case.truth for case in self.cases(task)]]
        return Resamples.clusters(((times - times[0]) // BLOCK).tolist())

    def score(self, own: Tensor, base: Tensor) -> Scores:
        """Return pooled ratio, ratio and RMSE of every channel from square errors (N,C).

        ``ratio`` pools all channels: the root of the mean, over channels, of the mean square error
        in units of the mean square background error of the training period, over that of the
        background.
        """
        variance = self.source.background_sd.square()
        pooled = torch.stack([(errors / variance).mean(1) for errors in (own, base)], -1)
        errors, ratios = self.channel_scores(own, base)
        return joined([moments(pooled, root_ratio, "ratio"), *ratios, *errors])

    def bars(self) -> list[Bar]:
        """Return what must hold at every density: all help, and the network surely does."""
        bars = []
        for task in self.tasks:
            draws, base = self.draws(task.name), self.errors[task.name, REFERENCE][0]
            for method in (*self.forms, "oi"):
                errors = self.errors.get((task.name, method))
                if errors is None:
                    continue
                ratio = draws.intervals([self.score(seed_errors, base) for seed_errors in errors])[
                    "ratio"
                ]
                name = f"{method} over background, all fields, {task.name}"
                bars.append(Bar(name, ratio.value, "<=", 1.0))
                if method in self.forms:
                    upper = ratio.high if np.isfinite(ratio.high) else ratio.value
                    bars.append(Bar(f"{name}, upper end", upper, "<=", 1.0))
        if not self.forms:
            bars += [
                Bar(f"networks over background, all fields, {task.name}", math.nan, "<=", 1.0,
                    note=UNMEASURED)
                for task in self.tasks
            ]  # fmt: skip
        return bars


class ReanalysisSource(ReanalysisData, CaseExperiment[Case]):  # type: ignore[override]
    """Problems from a reanalysis in the schema of WeatherBench 2: the truth is its states.

    Observations are simulated: random networks, whose density is drawn log-uniformly, with Gaussian
    errors. In half of the problems every point has a separate error, log-uniform between 0.5 and 10
    times the usual one; one problem in 20 has no observation. Every timeline draws its times from
    one contiguous block of the training period.

    Args:
        store: Truth: a store in the schema of WeatherBench 2, path or URL.
        background: Background of every time: the state that many hours earlier (``24h``), a store
            of forecasts or of other fields, or a forecast model by its name.
        lead_hours: Lead of the forecasts; of a store its shortest by default, of a model 24.
        variables: Names of WeatherBench 2; those of the store whose unit is known by default.
        levels: In hPa; all of the store by default.
        validation: Periods that validate, ``[2019]``; by the length of the store by default.
        held_out: Periods that scores are computed on, ``["2020-01", "2020-03-10/2020-04-20"]``.
        gap_days: Days next to another period that are left out of those.
        error_sd: Standard deviation of observation errors by variable, in its unit; that of usual
            reports by default.
        cache: Folder of what is made of the store; in the run folder by default.
        min_density: Smallest fraction of grid points observed in a training problem.
        max_density: Largest fraction; the draw is log-uniform between the two.
        blocks: Contiguous blocks of the training period, dealt to the timelines.
        max_cases: Held-out times that are scored at most, evenly spaced.
        seed: Seed of all random numbers.

    Raises:
        ValueError: A number is out of range.
        GatesError: A store is missing or damaged, does not fit, or has too few times.
    """

    forms = ("adas_increment",)
    decisive = (
        "background", "lead_hours", "variables", "levels", "validation", "held_out", "gap_days",
        "error_sd", "max_cases",
    )  # fmt: skip
    caption = "last of the held-out times"
    notes: tuple[str, ...] = (
        "Scores are of times that nothing was trained or tuned on. Times follow each other: "
        "intervals draw blocks of five days, which n counts.",
        "Observations are simulated from the store, at grid points and with independent errors.",
    )

    def __init__(
        self,
        store: str | None = None,
        background: str = "24h",
        lead_hours: float | None = None,
        variables: Sequence[str] = (),
        levels: Sequence[int] = (),
        validation: Sequence[str | int] = (),
        held_out: Sequence[str | int] = (),
        gap_days: float = 2.0,
        error_sd: dict[str, float] | None = None,
        cache: str | None = None,
        min_density: float = 0.003,
        max_density: float = 0.3,
        blocks: int = 8,
        max_cases: int = 40,
        seed: int = 0,
    ) -> None:
        if not 0 < min_density <= max_density <= 1:
            raise ValueError(
                f"need 0 < min_density <= max_density <= 1, got {min_density} and {max_density}"
            )
        if blocks < 1 or max_cases < 1:
            raise ValueError(
                f"need blocks and max_cases of at least 1, got {blocks} and {max_cases}"
            )
        super().__init__(
            store, background, lead_hours, variables, levels, validation, held_out, gap_days,
            error_sd, cache,
        )  # fmt: skip
        self.min_density, self.max_density = min_density, max_density
        self.blocks, self.max_cases, self.seed = blocks, max_cases, seed

    @property
    def headline(self) -> set[str]:
        """Metrics of tables: the ratio to the background, of all fields and of the main ones."""
        surface = {f"ratio_{label}" for label in self.channels.labels[: len(self.channels.surface)]}
        main = shown(self.channels, "ratio") - (surface if self.channels.upper else set())
        return main | {"ratio", f"rmse_{self.field}", f"ratio_{self.field}"}

    def store(self, folder: Path) -> Path:  # noqa: ARG002
        """Return the user's store."""
        return Path(self.store_path)

    def data(self) -> list[Data]:
        """Return the stores."""
        return self.sources

    def training_objects(self) -> list[str]:
        """Return the days for training, and those that choose weights."""
        return self._days(self.periods.training, self.periods.validation)

    def test_objects(self) -> list[str]:
        """Return the held-out days."""
        return self._days(self.periods.held_out)

    def _days(self, *positions: np.ndarray) -> list[str]:
        days = np.unique(self.times[np.concatenate(positions)].astype("datetime64[D]"))
        return [short_digest({"store": self.identity["store"], "day": str(day)}) for day in days]

    def tasks(self, densities: Sequence[float] = DENSITIES) -> list[DensityTask]:
        """Return a task for every density."""
        return [DensityTask(density) for density in densities]

    def cases(self, task: str = "", *, tuning: bool = False) -> list[Case]:  # noqa: ARG002
        """Return held-out times, evenly spaced; for tuning, four times that validate."""
        truths, backgrounds = self.pairs("validation" if tuning else "held_out")
        count = min(len(truths), TUNING_CASES if tuning else self.max_cases)
        chosen = np.linspace(0, len(truths) - 1, count).round().astype(int)
        pairs = zip(truths[chosen].tolist(), backgrounds[chosen].tolist(), strict=True)
        return [Case(*pair) for pair in pairs]

    def situation(self, task: Task, case: Case, members: int = 1) -> Situation:  # noqa: ARG002
        """Return background, observations and truth of a case, the same for every method."""
        truth, draw = self.truth[case.truth], generator(20, case.truth, round(task.density * 1e6))
        network = drawn_network(self.grid, task.density, draw)
        observations = observe(truth, network, self.observation_error, generator=draw)
        background = self.backgrounds[case.background][None, None]
        return Situation(background, GriddedObservations.stack([observations]), truth)

    def climatology(self, case: Case) -> Tensor:
        """Return the climatology (C,H,W) of the time of a case."""
        return read_climatology(self.paths[CLIMATOLOGY], self.channels, self.times[case.truth])

    def methods(self, task: str) -> list[Method]:  # noqa: ARG002
        """Return the classical methods, the same for all tasks; the background comes first.

        Optimal interpolation needs longitudes of equal steps and a table of H H W numbers, and is
        left out where that exceeds a gigabyte.
        """
        grid = self.grid
        rivals = [
            Method(REFERENCE, lambda _: FreeRun()),
            Method(
                "inverse_distance",
                lambda s: InverseDistance(grid, power=s["power"], background_km=s["background_km"]),
                {"power": (1.0, 6.0), "background_km": (100.0, 5000.0)},
            ),
        ]
        if has_equal_steps(grid) and 8 * grid.shape[0] ** 2 * grid.shape[1] <= TABLE_BYTES:
            box = {"length_km": (300.0, 3000.0), "scale": (0.3, 3.0)}
            rivals.append(Method("oi", self._interpolation, box))
        return rivals

    def _interpolation(self, setting: Setting) -> Assimilator:
        return IterativeInterpolation(
            self.covariance.with_length(setting["length_km"]),
            scale=setting["scale"],
            tolerance=TOLERANCE,
        )

    @cached_property
    def covariance(self) -> HomogeneousCovariance:
        """Covariance of background errors of training times, evenly spaced."""
        truths, backgrounds = self.pairs("training")
        frame = 4 * self.channels.num_channels * self.grid.shape[0] * self.grid.shape[1]
        count = min(len(truths), MOST_PAIRS, max(2, PAIR_BYTES // frame))
        chosen = np.linspace(0, len(truths) - 1, count).round().astype(int)
        errors = torch.stack(
            [
                self.truth[int(truths[number])] - self.backgrounds[int(backgrounds[number])]
                for number in chosen
            ]
        )
        return HomogeneousCovariance.from_samples(errors, self.grid, length_km=1000.0)

    def tuning_error(self, task: Task, errors: Tensor) -> float:  # noqa: ARG002
        """Return the mean RMSE over the background error."""
        return float((errors.mean(0).sqrt() / self.background_sd).mean())

    def scores(
        self,
        densities: Sequence[float],
        load: Load,
        seeds: Sequence[int],
        forms: Sequence[str],
        settings: Settings,
        *,
        quick: bool = False,
    ) -> ReanalysisScores:
        """Return the evaluation on held-out times, or on three of them."""
        chosen = slice(None, None, max(1, len(self.cases()) // QUICK_CASES) if quick else 1)
        return ReanalysisScores(self, self.tasks(densities), load, seeds, forms, settings, chosen)

    # --- training problems

    def problem(self, step: int, timeline: int, *, validation: bool = False) -> AssimilationBatch:
        """Return the problem of a step and timeline, and read the states of its next one ahead."""
        truth, background = self._places(step, timeline, validation)
        if not validation:
            following = self._places(step + 1, timeline, validation)
            self.truth.ahead(following[:1])
            self.backgrounds.ahead(following[1:])
        state = self.truth[truth]
        return AssimilationBatch(
            timeline=torch.tensor(timeline),
            reset=torch.tensor(True),
            background=self.backgrounds[background],
            truth=state,
            observations=self._observed(state, step, timeline, validation),
            background_sd=self.background_sd,
            model=torch.tensor(0),
        )

    def _places(self, step: int, timeline: int, validation: bool) -> tuple[int, int]:
        """Return the positions of truth and background of a problem."""
        truths, backgrounds = self.pairs("validation" if validation else "training")
        if validation:
            # Evenly spaced and the same in every pass.
            chosen = int(len(truths) * ((step * 0.618034 + timeline * 0.324718) % 1.0))
        else:
            blocks = min(self.blocks, len(truths))
            block = contiguous_block(len(truths), blocks, timeline % blocks)
            chosen = block.start + int(
                torch.randint(len(block), (), generator=generator(self.seed, 0, step, timeline))
            )
        return int(truths[chosen]), int(backgrounds[chosen])

    def _observed(
        self, truth: torch.Tensor, step: int, timeline: int, validation: bool
    ) -> GriddedObservations:
        draw = generator(self.seed, 1 + validation, step, timeline)
        errors = self.observation_error[:, None, None].expand_as(truth)
        if validation:
            density = VALIDATION_DENSITIES[timeline % len(VALIDATION_DENSITIES)]
        else:
            low, high = math.log(self.min_density), math.log(self.max_density)
            density = math.exp(low + (high - low) * torch.rand((), generator=draw).item())
            if bool(torch.rand((), generator=draw) < WITHOUT_REPORTS):
                density = 0.0
            if bool(torch.rand((), generator=draw) < 0.5):
                # One factor a point: a poor station is poor in all variables.
                low, high = map(math.log, ERROR_FACTORS)
                factor = low + (high - low) * torch.rand(truth.shape[1:], generator=draw)
                errors = errors * factor.exp()
        return observe(truth, drawn_network(self.grid, density, draw), errors, generator=draw)
