"""Train a network as a correction of interpolation, inside the cycle of both."""

from __future__ import annotations

from typing import Protocol, Self, cast

import torch
from torch import Tensor

from weather.baselines.optimal_interpolation import corrected
from weather.cycle import advance, diverged
from weather.models.adas.analysis import AdasAnalysis
from weather.models.adas.network import Adas
from weather.models.adas.presets import FORMS
from weather.state import Normalizer
from weather.training.adas_module import AdasModule
from weather.training.stream import AssimilationBatch, ProblemSource, require_same_shape

FRACTION = 0.5  # of the increments of interpolation and of a network that was trained alone
LATER_HOURS = 12.0
LOST = 1.2  # climatological standard deviations; unrelated states are 1.4 apart


class CorrectionSource(ProblemSource, Protocol):
    """Problems of timelines under way, and the interpolation that is to be corrected.

    Attributes:
        pool: Number of timelines under way.
        climatological_sd: (C,).
    """

    pool: int
    climatological_sd: Tensor

    def interpolated(self, batch: AssimilationBatch, background: Tensor) -> Tensor:
        """Return the analyses (B,C,H,W) of interpolation."""


def fractions(analysis: AdasAnalysis) -> tuple[float, float]:
    """Return the fractions of both increments in training: all of those of a guided network."""
    return (1.0, 1.0) if analysis.guided else (FRACTION, FRACTION)


class CorrectionModule(AdasModule):
    """Half of the increment of interpolation and half of a network's, in their own cycle.

    A fresh network is guided, that is, sees the increment of interpolation; all of both increments
    then count, so that it starts as interpolation.

    The loss is that of the analysis plus that of its forecast twelve hours later, through the
    forecast model but not through the next analysis: what grows weighs more. A timeline that is
    lost begins again with the background that its problem brings. The network has no drop path.

    Args:
        network: Of the analysis.
        forecasts: As for `AdasModule`.
        arguments: As for `AdasModule`.
    """

    source: CorrectionSource
    climatological_sd: Tensor

    @classmethod
    def of(cls, module: AdasModule, analysis: AdasAnalysis) -> Self:
        """Return a module that trains an analysis with the options of another module."""
        network = Adas(**{**analysis.network.arguments, "drop_path": 0.0})
        network.load_state_dict(analysis.network.state_dict())
        analysis.network = network
        made = cls(network, list(module.forecasts), **module.arguments)
        made.analysis = analysis
        return made.train()

    @classmethod
    def fresh(cls, module: AdasModule, form: str) -> Self:
        """Return a module that trains a guided network of a form, with the size of another's.

        Args:
            module: Whose options it has.
            form: Of the network, see `weather.models.adas.presets.FORMS`.
        """
        arguments = {**module.analysis.network.arguments, **FORMS[form]}
        for name in ("num_surface", "num_upper"):
            arguments[name] = 2 * arguments[name]
        network = Adas(**arguments)
        channels = network.num_channels // 2
        analysis = AdasAnalysis(
            network,
            Normalizer(torch.zeros(channels), torch.ones(channels)),
            torch.ones(channels),
            confidence_kind=module.analysis.confidence_kind,
            confidence_scale=module.analysis.confidence_scale,
            background_error=module.analysis.background_error,
            guided=True,
        )
        return cls.of(module, analysis)

    def setup(self, stage: str) -> None:
        """Take the interpolation and the climate of the data."""
        super().setup(stage)
        self.source = cast(CorrectionSource, self._data.source)
        sd = self.source.climatological_sd.to(self.dtype)
        self.register_buffer("climatological_sd", sd, persistent=False)

    def take_units(self, source: ProblemSource) -> None:
        """Keep those of weights; a fresh network takes those of the data."""
        if self.analysis.guided:
            super().take_units(source)

    def check_source(self, source: ProblemSource) -> None:
        """Refuse data of other channels or another grid than those of the network.

        Raises:
            GatesError: One of them differs; the message names the argument of the network.
        """
        arguments = dict(self.analysis.network.arguments)
        if self.analysis.guided:
            arguments |= {n: arguments[n] // 2 for n in ("num_surface", "num_upper")}
        require_same_shape(arguments, source.grid.shape, source.channels)

    def forward(self, batch: AssimilationBatch, background: Tensor) -> Tensor:
        """Return the corrected analysis (B,C,H,W) of ``background``."""
        interpolated = self.source.interpolated(batch, background)
        analysis = self.analysis(background, batch.observations, interpolated=interpolated)
        alpha, beta = fractions(self.analysis)
        return corrected(background, [(beta, analysis), (alpha, interpolated)])

    def loss_of(self, batch: AssimilationBatch, analysis: Tensor) -> Tensor:
        """Return the loss of the analysis plus that of its forecast."""
        later = analysis.clone()
        for number, forecast in enumerate(self.forecasts):
            rows = batch.model == number
            if bool(rows.any()):
                later[rows] = advance(forecast, analysis[rows], LATER_HOURS)
        assert batch.later is not None
        return super().loss_of(batch, analysis) + self.against(later, batch.later)

    def lost(self, states: Tensor, truth: Tensor) -> Tensor:
        """Return which states (B,) are lost: beyond 1.2 climatological standard deviations."""
        return diverged(states - truth, self.climatological_sd, LOST)

    def start_again(self, batch: AssimilationBatch) -> Tensor:
        """Return the background (B,C,H,W) of the batch, from which lost timelines restart."""
        return batch.background

    def validation_step(self, batch: AssimilationBatch, batch_idx: int) -> None:  # noqa: ARG002
        """Refuse: a score of one step says nothing of a cycle, which is run after the training."""
        raise AssertionError
