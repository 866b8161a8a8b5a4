"""Train a network as a correction of interpolation, inside the cycle of both."""

from __future__ import annotations

from typing import Protocol, Self, cast

from torch import Tensor

from weather.baselines.correction import corrected
from weather.cycle import advance, diverged
from weather.models.adas.analysis import AdasAnalysis
from weather.models.adas.network import Adas
from weather.training.adas_module import AdasModule
from weather.training.stream import AssimilationBatch, ProblemSource

FRACTION = 0.5  # of the increments of interpolation and of the network
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


class CorrectionModule(AdasModule):
    """Half of the increment of interpolation and half of a network's, in their own cycle.

    The loss is that of the analysis plus that of its forecast twelve hours later, through the
    forecast model but not through the next analysis: what grows weighs more. A timeline that is
    lost begins again with the background that its problem brings. The network has no drop path.

    Args:
        network: Of the analysis.
        forecasts: As for :class:`AdasModule`.
        arguments: As for :class:`AdasModule`.
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

    def setup(self, stage: str) -> None:
        """Take the interpolation and the climate of the data; units are those of the weights."""
        super().setup(stage)
        self.source = cast(CorrectionSource, self._data.source)
        sd = self.source.climatological_sd.to(self.dtype)
        self.register_buffer("climatological_sd", sd, persistent=False)

    def take_units(self, source: ProblemSource) -> None:
        """Keep those of the weights."""

    def forward(self, batch: AssimilationBatch, background: Tensor) -> Tensor:
        """Return the corrected analysis (B,C,H,W) of ``background``."""
        interpolated = self.source.interpolated(batch, background)
        analysis = self.analysis(background, batch.observations)
        return corrected(background, [(FRACTION, interpolated), (FRACTION, analysis)])

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
        """Return the states (B,C,H,W) that lost timelines continue from: what they began with."""
        return batch.background

    def validation_step(self, batch: AssimilationBatch, batch_idx: int) -> None:  # noqa: ARG002
        """Refuse: a score of one step says nothing of a cycle, which is run after the training."""
        raise AssertionError
