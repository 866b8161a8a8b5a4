"""Train FengWu: on one step from the data, then from its own forecasts in a replay buffer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from core_gates.errors import GatesError, check_at_least, check_fraction, check_positive
from weather.models.fengwu.network import FengWu
from weather.models.fengwu.trained_forecast import FengWuForecast
from weather.state import Normalizer
from weather.training.optimization import (
    adamw_one_cycle,
    gaussian_loss,
    normalized_rmse,
    schedule_steps,
)
from weather.training.stream import (
    ForecastBatch,
    ForecastDataModule,
    TrajectorySource,
    generator,
    require_same_shape,
)

DRAW, PLACE = 1, 2  # keys of random numbers


class Underway(NamedTuple):
    """A forecast that is under way.

    Attributes:
        frames: (2, C, H, W), its last two states, physical units.
        member: Number of the trajectory that it forecasts.
        time: Index in it of the later of the two states.
        lead: Steps since it left the trajectory.
    """

    frames: Tensor
    member: int
    time: int
    lead: int


class ReplayBuffer:
    """Keep the model's own forecasts and let training continue them, one step at a time.

    Every row of the global batch has slots, each of which holds one forecast under way. A training
    step of a row starts from one of its slots, or from the data; the forecast that it makes
    replaces the one it started from, or begins a new one. So errors of many steps are trained on
    without a gradient through more than one (FengWu, arXiv 2304.02948). Rows do not exchange
    forecasts: whatever rank holds a row, what it takes depends on seed, step and row alone. The
    states are kept in the memory of the host.

    Args:
        rows: Rows of the global batch.
        slots: Forecasts under way of every row.
        shape: (C, H, W) of a state.
        max_lead: Steps after which a forecast is given up.
        fraction: Fraction of the steps that start from the buffer once it holds something.
        seed: Decides which slots are taken.

    Attributes:
        lead: (rows, slots) steps since the data, 0 where a slot is empty.

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(
        self,
        rows: int,
        slots: int,
        shape: tuple[int, int, int],
        *,
        max_lead: int,
        fraction: float,
        seed: int,
    ) -> None:
        check_at_least(1, rows=rows, slots=slots, max_lead=max_lead)
        check_fraction(fraction=fraction)
        self.max_lead, self.fraction, self.seed = max_lead, fraction, seed
        self.frames = torch.zeros(rows, slots, 2, *shape)
        self.lead, self.member, self.time = (
            torch.zeros(rows, slots, dtype=torch.int64) for _ in range(3)
        )

    def draw(self, step: int, row: int) -> int | None:
        """Return the slot from which a row starts at a step; None for the data."""
        filled = self.lead[row].nonzero().flatten()
        draw = generator(self.seed, DRAW, step, row)
        if not len(filled) or float(torch.rand((), generator=draw)) >= self.fraction:
            return None
        return int(filled[int(torch.randint(len(filled), (), generator=draw))])

    def at(self, row: int, slot: int) -> Underway:
        """Return the forecast of a slot.

        Raises:
            ValueError: The slot is empty.
        """
        lead = int(self.lead[row, slot])
        if not lead:
            raise ValueError(f"slot {slot} of row {row} is empty")
        member, time = int(self.member[row, slot]), int(self.time[row, slot])
        return Underway(self.frames[row, slot], member, time, lead)

    def keep(self, step: int, row: int, slot: int | None, forecast: Underway) -> None:
        """Put a forecast where the one that it continues was, or begin a new one.

        A forecast beyond the largest lead leaves its slot empty. A new one takes an empty slot, or
        a random one.

        Args:
            step: Number of the step.
            row: Its row.
            slot: Where it started; None for the data.
            forecast: Its last two states.
        """
        if forecast.lead > self.max_lead:
            self.drop(row, slot)
            return
        if slot is None:
            empty = (self.lead[row] == 0).nonzero().flatten()
            draw = generator(self.seed, PLACE, step, row)
            drawn = int(torch.randint(self.lead.shape[1], (), generator=draw))
            slot = int(empty[0]) if len(empty) else drawn
        self.frames[row, slot] = forecast.frames.detach().to("cpu", torch.float32)
        self.lead[row, slot], self.member[row, slot] = forecast.lead, forecast.member
        self.time[row, slot] = forecast.time

    def drop(self, row: int, slot: int | None) -> None:
        """Empty a slot, if there is one."""
        if slot is not None:
            self.lead[row, slot] = 0

    def state_dict(self) -> dict[str, Tensor]:
        """Return the content, as a checkpoint holds it: tensors (rows, slots, ...)."""
        return {name: getattr(self, name) for name in ("frames", "lead", "member", "time")}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up the content of a checkpoint.

        Raises:
            GatesError: It has other rows or slots.
        """
        stored, expected = tuple(state["lead"].shape), tuple(self.lead.shape)
        if stored != expected:
            raise GatesError(
                f"the checkpoint holds forecasts of {stored[0]} rows with {stored[1]} slots, this "
                f"run has {expected[0]} with {expected[1]}: resume with data.timelines {stored[0]} "
                f"and model.slots {stored[1]}"
            )
        for name, buffer in self.state_dict().items():
            buffer.copy_(state[name])


COLD = 3  # key of random numbers


class Start(NamedTuple):
    """From where the rows of a batch start.

    Attributes:
        batch: Frames and targets, those of the buffer included.
        slots: The slot of every row; None for the data.
        leads: Steps since the data of every row.
    """

    batch: ForecastBatch
    slots: list[int | None]
    leads: list[int]


class FengWuModule(L.LightningModule):
    """Gaussian likelihood of the next state, from the data and from a replay buffer.

    The first ``one_step`` steps start from the data alone. After them a fraction of the rows
    continues a forecast that the model has made before, against the true state of that time. The
    buffer is part of the checkpoint: a training that is resumed takes the same steps.

    Args:
        network: The network that is trained.
        learning_rate: Peak of the one-cycle schedule.
        weight_decay: Weight decay of AdamW.
        betas: Both betas of AdamW.
        warmup: Fraction of the steps in which the learning rate rises.
        one_step: Steps without the buffer.
        replay: Fraction of the rows that start from the buffer; 0 trains on one step alone.
        slots: Forecasts under way of every row.
        max_lead: Steps after which a forecast leaves the buffer.
        cold_start: Fraction of the rows from the data whose earlier frame is not given, as at the
            start of a cycle.
        divergence_limit: Normalized RMSE above which a forecast leaves the buffer.
        lat_weight: Weight the loss by cell area.
        validation_leads: Steps of the forecasts by which a validation pass scores.
    """

    area_weights: Tensor

    def __init__(
        self,
        network: FengWu,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.95),
        warmup: float = 0.1,
        one_step: int = 0,
        replay: float = 0.5,
        slots: int = 4,
        max_lead: int = 40,
        cold_start: float = 0.1,
        divergence_limit: float = 3.0,
        lat_weight: bool = True,
        validation_leads: int = 4,
    ) -> None:
        super().__init__()
        check_positive(learning_rate=learning_rate, validation_leads=validation_leads)
        check_fraction(replay=replay, cold_start=cold_start)
        count = network.num_channels
        self.forecast = FengWuForecast(
            network, Normalizer(torch.zeros(count), torch.ones(count)), torch.ones(count)
        )
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.betas, self.warmup = betas, warmup
        self.one_step, self.replay = one_step, replay
        self.slots, self.max_lead, self.cold_start = slots, max_lead, cold_start
        self.divergence_limit, self.lat_weight = divergence_limit, lat_weight
        self.validation_leads = validation_leads
        self.buffer: ReplayBuffer | None = None

    def setup(self, stage: str) -> None:  # noqa: ARG002
        """Take the units from the data; a checkpoint replaces them later.

        Raises:
            GatesError: The data has other channels or another grid than the network.
        """
        if self.trainer.precision == "64-true":
            self.double()  # Lightning reads a checkpoint before it does so, and would round it
        data = self._data
        self.check_source(data.source)
        self.forecast.normalizer.load_state_dict(data.source.normalizer.state_dict())
        self.forecast.increment_sd.copy_(data.source.increment_sd)
        self.forecast.step_hours = data.source.step_hours
        self.register_buffer(
            "area_weights", data.source.grid.area_weights().to(self.dtype), persistent=False
        )
        if self.replay:
            network = self.forecast.network
            self.buffer = ReplayBuffer(
                data.timelines,
                self.slots,
                (network.num_channels, *network.grid_shape),
                max_lead=self.max_lead,
                fraction=self.replay,
                seed=data.source.seed,
            )

    def check_source(self, source: TrajectorySource) -> None:
        """Refuse data of other channels or another grid than those of the network.

        Raises:
            GatesError: One of them differs; the message names the argument of the network.
        """
        arguments = self.forecast.network.arguments
        require_same_shape(
            {**arguments, "grid_shape": tuple(arguments["grid_shape"])},
            source.grid.shape,
            source.channels,
        )

    @property
    def _data(self) -> ForecastDataModule:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, ForecastDataModule)
        return data

    def training_step(self, batch: ForecastBatch, batch_idx: int) -> Tensor:  # noqa: ARG002
        """Forecast one step, and keep the forecasts for later steps."""
        start = self.start(batch)
        batch = start.batch
        change = self.forecast.change(batch.previous, batch.current)
        target = self.forecast.scaled_change(batch.current, batch.following).to(change.mean)
        loss = gaussian_loss(
            change.mean,
            change.log_variance,
            target,
            area_weights=self.area_weights if self.lat_weight else None,
        )
        scale = self.forecast.increment_sd.to(batch.current)[:, None, None]
        self._keep(start, batch.current + scale * change.mean.detach().to(batch.current))
        error = (change.mean.detach() - target).square().mean().sqrt()
        self.log("train/loss", loss.detach())
        self.log("train/score", error, prog_bar=True)  # 1 is persistence, from the data
        self.log("train/lead", sum(start.leads) / len(start.leads))
        return loss

    def start(self, batch: ForecastBatch) -> Start:
        """Replace rows of a batch from the data by forecasts of the buffer."""
        batch = ForecastBatch(*(column.clone() for column in batch))
        source = self._data.source
        slots: list[int | None] = []
        leads = []
        for index, (step, row) in enumerate(_numbers(batch.step, batch.row)):
            buffer = self.buffer if step >= self.one_step else None
            slot = None if buffer is None else buffer.draw(step, row)
            slots.append(slot)
            if buffer is None or slot is None:
                leads.append(0)
                draw = generator(source.seed, COLD, step, row)
                if float(torch.rand((), generator=draw)) < self.cold_start:
                    batch.previous[index] = batch.current[index]
                continue
            entry = buffer.at(row, slot)
            leads.append(entry.lead)
            batch.member[index], batch.time[index] = entry.member, entry.time
            batch.previous[index], batch.current[index] = entry.frames.to(batch.current)
            batch.following[index] = source.state(entry.member, entry.time + 1).to(batch.current)
        return Start(batch, slots, leads)

    @torch.no_grad()
    def _keep(self, start: Start, forecast: Tensor) -> None:
        """Put forecasts into the buffer that have a next state and have not left the truth."""
        buffer, batch = self.buffer, start.batch
        if buffer is None:
            return
        last = self._data.source.num_times() - 1
        score = normalized_rmse(
            forecast - batch.following, self.forecast.normalizer.std.to(forecast), self.area_weights
        )
        for index, (step, row, member, time) in enumerate(
            _numbers(batch.step, batch.row, batch.member, batch.time)
        ):
            slot = start.slots[index]
            if time + 1 >= last or not float(score[index]) <= self.divergence_limit:
                buffer.drop(row, slot)
                continue
            frames = torch.stack((batch.current[index], forecast[index]))
            buffer.keep(step, row, slot, Underway(frames, member, time + 1, start.leads[index] + 1))

    def validation_step(self, batch: ForecastBatch, batch_idx: int) -> None:  # noqa: ARG002
        """Score forecasts over several steps by the mean normalized RMSE over all channels."""
        source, std = self._data.source, self.forecast.normalizer.std
        scores = []
        steps = self.forecast.rollout(batch.current, batch.previous)
        places = list(_numbers(batch.member, batch.time))
        for lead, following in zip(range(1, self.validation_leads + 1), steps, strict=False):
            truth = torch.stack(
                [source.state(member, time + lead, validation=True) for member, time in places]
            ).to(following.mean)
            scores.append(normalized_rmse(following.mean - truth, std.to(truth), self.area_weights))
            hours = f"{round(lead * self.forecast.step_hours)}h"
            if lead in (1, self.validation_leads):
                stay = normalized_rmse(batch.current - truth, std.to(truth), self.area_weights)
                self._log_validation(f"score_{hours}", scores[-1].mean(), len(truth))
                self._log_validation(f"persistence_{hours}", stay.mean(), len(truth))
        self._log_validation("score", torch.stack(scores).mean(), len(batch.current))

    def _log_validation(self, name: str, value: Tensor, rows: int) -> None:
        self.log(f"val/{name}", value, prog_bar=name == "score", sync_dist=True, batch_size=rows)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Gather the buffers of all ranks, row by row: each rank gives its own."""
        if self.buffer is not None:
            checkpoint["replay"] = {
                name: self._gathered(value) for name, value in self.buffer.state_dict().items()
            }

    def _gathered(self, value: Tensor) -> Tensor:
        """Return rows (K, ...) of all ranks, on the host."""
        world, rank = self.trainer.world_size, self.trainer.global_rank
        if world == 1:
            return value
        rows = []
        for number, row in enumerate(value):
            row = row.to(self.device)
            here = row if number % world == rank else torch.zeros_like(row)
            rows.append(self.trainer.strategy.reduce(here, reduce_op="sum").cpu())
        return torch.stack(rows)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Give every rank all rows: it continues its own.

        Raises:
            GatesError: The run has another number of rows or slots.
        """
        if self.buffer is not None and "replay" in checkpoint:
            self.buffer.load_state_dict(checkpoint["replay"])

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW under a one-cycle schedule."""
        return adamw_one_cycle(
            self.forecast.network.parameters(),
            schedule_steps(self.trainer, self._data.steps),
            learning_rate=self.learning_rate,
            betas=self.betas,
            weight_decay=self.weight_decay,
            warmup=self.warmup,
        )


def _numbers(*columns: Tensor) -> Iterator[tuple[int, ...]]:
    """Yield the entries of columns (B,), row by row."""
    return zip(*(column.tolist() for column in columns), strict=True)
