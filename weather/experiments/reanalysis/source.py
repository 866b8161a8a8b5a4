"""Assimilation problems from the user's own store."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from weather.data.training_cache import contiguous_block
from weather.experiments.reanalysis.own_store import ReanalysisExperiment
from weather.observations.gridded import GriddedObservations
from weather.observations.simulated import drawn_network, observe
from weather.training.stream import AssimilationBatch, generator

WITHOUT_REPORTS = 0.05  # of the training problems
ERROR_FACTORS = (0.5, 10.0)
VALIDATION_DENSITIES = (0.1, 0.01)


class ReanalysisSource(ReanalysisExperiment):
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
            own = contiguous_block(len(truths), blocks, timeline % blocks)
            chosen = own.start + int(
                torch.randint(len(own), (), generator=generator(self.seed, 0, step, timeline))
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
        network = drawn_network(self.grid, density, draw)
        return observe(truth, network, errors, generator=draw)
