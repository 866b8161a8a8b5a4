"""Train Adas on recorded backgrounds, then inside its own cycle."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from core_gates.errors import GatesError
from weather.cycle import FramesForecast, advance
from weather.models.adas.analysis import AdasAnalysis, BackgroundError
from weather.models.adas.network import Adas
from weather.models.adas.presets import FORMS
from weather.state import Normalizer
from weather.training.optimization import (
    adamw_one_cycle,
    log_loss,
    normalized_rmse,
    schedule_steps,
    unify_loss,
)
from weather.training.stream import (
    AssimilationBatch,
    AssimilationDataModule,
    ProblemSource,
    require_same_shape,
)

LOSSES = {
    "unify_mae": partial(unify_loss, kind="mae"),
    "unify_mse": partial(unify_loss, kind="mse"),
    "log_mae": partial(log_loss, kind="mae"),
    "log_mse": partial(log_loss, kind="mse"),
}


class AdasModule(L.LightningModule):
    """FengWu-Adas training: one analysis per step, on the background that the batch asks for.

    A problem with ``reset`` brings its own recorded background (stage 1, and the first cycle of
    every block of stage 2). Without it, the background is the 6-hour forecast from the analysis
    that this module made one step before on the same timeline, detached (stage 2, cyclic
    training); a model of two frames gets the analysis before that, too. The carried analyses of all
    ranks are part of the checkpoint.

    Args:
        network: The assimilation network.
        forecasts: Forecast models ``(states, hours) -> states``; a problem names one by number.
        confidence_kind: What the network knows of an observation: that it exists (``binary``), or
            how good it is, too (``error``).
        loss: Training loss: ``unify_mae`` or ``unify_mse`` (FengWu-Adas), ``log_mae`` or
            ``log_mse``.
        lat_weight: Weight the loss by cell area; the published loss has none.
        learning_rate: Peak of the one-cycle schedule.
        weight_decay: Weight decay of AdamW.
        betas: Both betas of AdamW.
        warmup: Fraction of the steps in which the learning rate rises.
        divergence_limit: Normalized RMSE above which a carried analysis returns to the truth.
        hours: Length of one cycle.
        confidence_scale: Fraction of the background error that the confidence is relative to.
        background_error: Where the background error comes from: ``training`` or the
            ``innovation``, see `AdasAnalysis`.

    Attributes:
        arguments: What the module was made with, network and forecasts aside, to make a variant.
    """

    area_weights: Tensor

    def __init__(
        self,
        network: Adas,
        forecasts: Sequence[nn.Module] = (),
        confidence_kind: Literal["binary", "error"] = "error",
        loss: Literal["unify_mae", "unify_mse", "log_mae", "log_mse"] = "unify_mae",
        lat_weight: bool = False,
        learning_rate: float = 1e-4,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.9),
        warmup: float = 0.2,
        divergence_limit: float = 3.0,
        hours: float = 6.0,
        confidence_scale: float = 1.0,
        background_error: BackgroundError = "training",
    ) -> None:
        given = dict(locals())
        super().__init__()
        if not learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, found {learning_rate:g}")
        not_given = ("self", "__class__", "network", "forecasts")
        self.arguments = {name: value for name, value in given.items() if name not in not_given}
        num_channels = network.num_channels
        units = Normalizer(torch.zeros(num_channels), torch.ones(num_channels))
        self.analysis = AdasAnalysis(
            network,
            units,
            torch.ones(num_channels),
            confidence_kind=confidence_kind,
            confidence_scale=confidence_scale,
            background_error=background_error,
        )
        self.forecasts = nn.ModuleList(forecasts)
        self.loss, self.lat_weight = LOSSES[loss], lat_weight
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.betas, self.warmup = betas, warmup
        self.divergence_limit, self.hours = divergence_limit, hours
        self.carried: dict[str, Tensor] = {}
        self.before: dict[str, Tensor] = {}  # the analyses before them, for models of two frames

    def variant(
        self, form: str, *, learning_rate: float | None = None, weight_decay: float | None = None
    ) -> AdasModule:
        """Return a fresh module of another form, see `weather.models.adas.presets.FORMS`.

        Args:
            form: Name of the form.
            learning_rate: To be replaced, if given.
            weight_decay: To be replaced, if given.
        """
        network = Adas(**{**self.analysis.network.arguments, **FORMS[form]})
        changes = {"learning_rate": learning_rate, "weight_decay": weight_decay}
        given = {name: value for name, value in changes.items() if value is not None}
        return AdasModule(network, list(self.forecasts), **{**self.arguments, **given})

    def setup(self, stage: str) -> None:  # noqa: ARG002
        """Take the units of the training period from the data; a checkpoint replaces them later.

        Raises:
            GatesError: The data has other channels or another grid than the network.
        """
        if self.trainer.precision == "64-true":
            self.double()  # Lightning reads a checkpoint before it does so, and would round it
        source = self._data.source
        self.check_source(source)
        self.take_units(source)
        self.register_buffer(
            "area_weights", source.grid.area_weights().to(self.dtype), persistent=False
        )

    def take_units(self, source: ProblemSource) -> None:
        """Take mean, standard deviation and background error of the training period."""
        self.analysis.normalizer.load_state_dict(source.normalizer.state_dict())
        self.analysis.background_sd.copy_(source.background_sd)

    def check_source(self, source: ProblemSource) -> None:
        """Refuse data of other channels or another grid than those of the network.

        Raises:
            GatesError: One of them differs; the message names the argument of the network.
        """
        require_same_shape(self.analysis.network.arguments, source.grid.shape, source.channels)

    def forward(self, batch: AssimilationBatch, background: Tensor) -> Tensor:
        """Return the analysis (B,C,H,W) of ``background`` with the batch's observations."""
        analysis: Tensor = self.analysis(background, batch.observations, batch.background_sd)
        return analysis

    @property
    def _data(self) -> AssimilationDataModule:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, AssimilationDataModule)
        return data

    def training_step(self, batch: AssimilationBatch, batch_idx: int) -> Tensor:  # noqa: ARG002
        """Analyze once and carry the detached analysis to the timeline's next step."""
        analysis = self(batch, self.background(batch, "train"))
        loss = self.loss_of(batch, analysis)
        score = self._carry(batch, analysis, "train").mean()
        self.log("train/loss", loss.detach())
        self.log("train/score", score, prog_bar=True)
        return loss

    def loss_of(self, batch: AssimilationBatch, analysis: Tensor) -> Tensor:
        """Return the training loss of analyses (B,C,H,W)."""
        return self.against(analysis, batch.truth)

    def against(self, states: Tensor, truth: Tensor) -> Tensor:
        """Return the configured loss of states (B,C,H,W), physical units."""
        normalize = self.analysis.normalizer.normalize
        weights = self.area_weights if self.lat_weight else None
        return self.loss(normalize(states), normalize(truth.to(states)), area_weights=weights)

    def on_validation_epoch_start(self) -> None:
        """Forget the carried analyses of the last validation pass."""
        self.carried.pop("val", None)
        self.before.pop("val", None)

    def validation_step(self, batch: AssimilationBatch, batch_idx: int) -> None:  # noqa: ARG002
        """Score the analysis by its mean normalized RMSE over *all* channels.

        The unified loss must not choose the checkpoint: its value is the error of channel 0.
        """
        analysis = self(batch, self.background(batch, "val"))
        score = self._carry(batch, analysis, "val").mean()
        self.log("val/score", score, prog_bar=True, sync_dist=True, batch_size=len(analysis))
        std = self.analysis.normalizer.std
        for channel, label in enumerate(self._data.source.channels.labels):
            error = analysis[:, channel, None] - batch.truth[:, channel, None].to(analysis)
            value = normalized_rmse(error, torch.ones_like(std[:1]), self.area_weights).mean()
            self.log(f"val/rmse_{label}", value, sync_dist=True, batch_size=len(analysis))

    @torch.no_grad()
    def background(self, batch: AssimilationBatch, period: str) -> Tensor:
        """Return the recorded background, or the forecast from the carried analysis.

        Raises:
            GatesError: A problem is to be cycled with a forecast model that does not exist.
        """
        background = batch.background.to(self.dtype)
        cycled = ~batch.reset
        if not bool(cycled.any()):
            return background
        if int(batch.model[cycled].max()) >= len(self.forecasts):
            raise GatesError(
                f"cycled problems ask for forecast model {int(batch.model[cycled].max())}, but "
                f"there are {len(self.forecasts)}: list all of them in model.forecasts"
            )
        background = background.clone()
        carried = self.carried[period].to(background)
        before = self.before.get(period, carried).to(background)
        for number, forecast in enumerate(self.forecasts):
            rows = cycled & (batch.model == number)
            if bool(rows.any()):
                timelines = batch.timeline[rows]
                background[rows] = advance(
                    forecast, carried[timelines], self.hours, before[timelines]
                )
        return self._guard(background, batch)[0]

    def lost(self, states: Tensor, truth: Tensor) -> Tensor:
        """Return which states (B,) have left the truth: beyond ``divergence_limit``, or NaN."""
        return ~(self._score(states, truth) <= self.divergence_limit)

    def start_again(self, batch: AssimilationBatch) -> Tensor:
        """Return the states (B,C,H,W) that lost timelines continue from: the truth."""
        return batch.truth

    def _score(self, states: Tensor, truth: Tensor) -> Tensor:
        error = states - truth.to(states)
        return normalized_rmse(error, self.analysis.normalizer.std, self.area_weights)

    def _guard(self, states: Tensor, batch: AssimilationBatch) -> tuple[Tensor, Tensor]:
        """Return states, replaced where they are lost, and which are (B,)."""
        lost = self.lost(states, batch.truth.to(states))
        again = self.start_again(batch).to(states)
        return torch.where(lost[:, None, None, None], again, states), lost

    def _timelines(self, period: str) -> int:
        """Return how many timelines are under way; more than rows of a batch for some sources."""
        data = self._data
        timelines = getattr(data.source, "pool", data.timelines)
        return timelines if period == "train" else data.validation_timelines

    @torch.no_grad()
    def _carry(self, batch: AssimilationBatch, analysis: Tensor, period: str) -> Tensor:
        """Store the guarded analyses by global timeline and return the scores of the raw ones."""
        score = self._score(analysis.detach(), batch.truth)
        guarded, lost = self._guard(analysis.detach(), batch)
        carried = self.carried.get(period)
        if carried is None:
            carried = guarded.new_zeros(self._timelines(period), *guarded.shape[1:])
        carried = carried.to(guarded)  # a checkpoint is loaded before the module finds its device
        if any(isinstance(forecast, FramesForecast) for forecast in self.forecasts):
            # Where a timeline begins, or began again from the truth, no earlier state is known.
            begun = (lost | batch.reset)[:, None, None, None]
            before = self.before.get(period, torch.zeros_like(carried)).to(guarded)
            before[batch.timeline] = torch.where(begun, guarded, carried[batch.timeline])
            self.before[period] = before
        carried[batch.timeline] = guarded
        self.carried[period] = carried
        self.log(
            f"{period}/lost", lost.float().mean(), batch_size=len(score), sync_dist=period == "val"
        )
        return score

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Gather the carried analyses of all ranks; each rank holds zeros elsewhere."""
        for name, states in (("carried", self.carried), ("before", self.before)):
            if "train" in states:
                checkpoint[name] = self.trainer.strategy.reduce(
                    self._owned_rows(states["train"]), reduce_op="sum"
                )

    def _owned_rows(self, carried: Tensor) -> Tensor:
        rows = torch.arange(len(carried), device=carried.device)
        mine = rows % self.trainer.world_size == self.trainer.global_rank
        return torch.where(mine[:, None, None, None], carried, 0)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Give every rank all carried analyses: it reads only the rows of its timelines.

        Raises:
            GatesError: The run has another number of timelines.
        """
        if "carried" not in checkpoint:
            return
        count = len(checkpoint["carried"])
        if self._trainer is not None and count != (expected := self._timelines("train")):
            raise GatesError(
                f"the checkpoint carries {count} timelines, the data has {expected}: resume with "
                f"data.timelines {count}"
            )
        for name, states in (("carried", self.carried), ("before", self.before)):
            if name in checkpoint:
                states["train"] = checkpoint[name].clone()

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW under a one-cycle schedule."""
        return adamw_one_cycle(
            self.analysis.parameters(),
            schedule_steps(self.trainer, self._data.steps),
            learning_rate=self.learning_rate,
            betas=self.betas,
            weight_decay=self.weight_decay,
            warmup=self.warmup,
        )
