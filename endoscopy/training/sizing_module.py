"""Train a sizing network with gradient routing; validation scores of objects on all ranks."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import lightning as L
import numpy as np
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

from core_gates.errors import GatesError
from core_gates.training import GradientRouting, RoutedStep, SyncBatchNorm
from core_gates.training.gradient_routing import Loss, Mode
from endoscopy.metrics.classification import (
    TRUTH,
    CutOffs,
    confusion_matrix,
    has_known_class,
    macro_f1,
)
from endoscopy.models import MultiStreamSizer, gate_parameters, gates_of, weight_parameters
from endoscopy.training.targets import LogSize, SizeTarget


def warm_restarts(
    optimizer: Optimizer, epochs: int, cycles: int, min_learning_rate: float
) -> CosineAnnealingWarmRestarts:
    """Return a cosine from the learning rate to the smallest one, ``cycles`` times.

    It is stepped after every batch with the epoch as a real number.

    Args:
        optimizer: Whose learning rate is scheduled.
        epochs: Length of the training.
        cycles: Number of restarts, the first included.
        min_learning_rate: End of each cycle.

    Raises:
        ValueError: There are more cycles than epochs.
    """
    if not 1 <= cycles <= epochs:
        raise ValueError(f"cycles must lie between 1 and the {epochs} epochs, got {cycles}")
    return CosineAnnealingWarmRestarts(optimizer, epochs // cycles, eta_min=min_learning_rate)


class ObjectScores(NamedTuple):
    """Scores of the median prediction of each object.

    Attributes:
        mae_mm: Mean absolute error of objects whose size is known, not a lower bound.
        macro_f1: Macro F1 of the three size classes.
    """

    mae_mm: float
    macro_f1: float


def object_scores(rows: Tensor, cut_offs: CutOffs) -> ObjectScores:
    """Score the median of each object's frames.

    Args:
        rows: One per frame (N, 5): object, frame, size_mm, censored, predicted_mm; a repeated
            frame counts once, since a sampler repeats frames to fill up a rank.
        cut_offs: Those of the predictions.

    Returns:
        The scores; NaN and 0 if a prediction is not finite, NaN where no object counts.
    """
    table = rows.double().numpy()
    _, first = np.unique(table[:, 1], return_index=True)
    table = table[first]
    if not np.isfinite(table[:, 4]).all():
        return ObjectScores(float("nan"), 0.0)
    _, first, member = np.unique(table[:, 0], return_index=True, return_inverse=True)
    predicted = np.array([np.median(table[member == i, 4]) for i in range(len(first))])
    sizes, censored = table[first, 2], table[first, 3] > 0
    errors = np.abs(predicted - sizes)[~censored]
    has_class = has_known_class(sizes, censored)
    matrix = confusion_matrix(
        TRUTH.classes(sizes[has_class]), cut_offs.classes(predicted[has_class])
    )
    mae = float(errors.mean()) if len(errors) else float("nan")
    return ObjectScores(mae, float(macro_f1(matrix)))


def gather_rows(rows: Tensor) -> Tensor:
    """Return the rows (N, 5) of all ranks, which may have different numbers of them."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows.cpu()
    parts: list[Tensor] = [rows] * dist.get_world_size()
    dist.all_gather_object(parts, rows.cpu())
    return torch.cat(parts)


Batch = dict[str, Any]
OptimizerName = Literal["adam", "adamw", "sgd"]
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}
NEARLY_CLOSED = 0.1


class SizingModule(L.LightningModule):
    """Polyp sizing with gates that learn in a separate pass (arXiv 2407.04400).

    A batch is a dictionary: ``streams`` (B, C, H, W) by name, ``size_mm`` (B,), and optionally
    ``geometry`` (B, 4), ``censored`` (B,) bool, ``object`` and ``frame`` (B,) int64. Validation
    scores the median prediction of each object.

    Args:
        model: The network that is trained.
        target: What it returns; the logarithm of the size when None.
        gate_target: Another target, of the same outputs, whose loss moves the gates; ``target``
            when None.
        gradient_routing: How gates and weights learn, see
            `core_gates.GradientRouting`; ``off`` freezes the gates.
        every_k: Period of mode ``every_k``.
        optimizer: Optimizer of the weights; gates have the same without weight decay.
        learning_rate: Learning rate of the weights at the start of each cycle.
        min_learning_rate: Learning rate of the weights at the end of each cycle.
        weight_decay: Weight decay of the weights; gates have none.
        gate_learning_rate: Learning rate of the gates, which is constant.
        clip: Largest gradient norm of the weights.
        gate_clip: Largest gradient norm of the gates.
        cycles: Number of cosine cycles during training.
        accumulate: Parts of a batch, whose gradients add up to that of the batch.
        l0_weight: Weight of the expected number of open gates, for gates of kind ``l0``.
        cut_offs_mm: Cut-offs between the predicted classes in validation.
        sync_batch_norm: Normalize over the batches of all ranks.

    Raises:
        ValueError: Arguments do not fit each other; the message names them.
    """

    def __init__(
        self,
        model: MultiStreamSizer,
        target: SizeTarget | None = None,
        gate_target: SizeTarget | None = None,
        gradient_routing: Mode = "dual",
        every_k: int = 1,
        optimizer: OptimizerName = "adamw",
        learning_rate: float = 1e-3,
        min_learning_rate: float = 0.0,
        weight_decay: float = 0.01,
        gate_learning_rate: float = 0.01,
        clip: float | None = None,
        gate_clip: float | None = None,
        cycles: int = 1,
        accumulate: int = 1,
        l0_weight: float = 0.0,
        cut_offs_mm: tuple[float, float] = (5.0, 10.0),
        sync_batch_norm: bool = True,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        self.target = target or LogSize()
        self.gate_target = gate_target or self.target
        self.gradient_routing, self.every_k = gradient_routing, every_k
        self.optimizer_name = optimizer
        self.learning_rate, self.min_learning_rate = learning_rate, min_learning_rate
        self.weight_decay, self.gate_learning_rate = weight_decay, gate_learning_rate
        self.clip, self.gate_clip = clip, gate_clip
        self.cycles, self.accumulate, self.l0_weight = cycles, accumulate, l0_weight
        self.cut_offs, self.sync_batch_norm = CutOffs(*cut_offs_mm), sync_batch_norm
        self._check()
        if gradient_routing == "off":
            for parameter in gate_parameters(model).values():
                parameter.requires_grad_(False)
        self.routing: GradientRouting | None = None
        self._resumed: dict[str, int] | None = None
        self._rows: list[Tensor] = []

    def _check(self) -> None:
        for target in (self.target, self.gate_target):
            if target.outputs != self.model.outputs:
                raise ValueError(
                    f"{type(target).__name__} needs {target.outputs} outputs, the network has"
                    f" {self.model.outputs}: set outputs of the network"
                )
        if self.gradient_routing != "off" and not gate_parameters(self.model):
            raise ValueError(
                f"the network has no gates to learn: gradient_routing must be 'off', not"
                f" {self.gradient_routing!r}"
            )
        if self.accumulate < 1 or self.l0_weight < 0 or self.optimizer_name not in OPTIMIZERS:
            raise ValueError(
                "accumulate must be at least 1, l0_weight not negative and optimizer one of"
                f" {', '.join(OPTIMIZERS)}; got {self.accumulate}, {self.l0_weight} and"
                f" {self.optimizer_name!r}"
            )
        if self.l0_weight:
            self._penalty(self.model)  # refuses gates that never close

    def setup(self, stage: str) -> None:
        """Synchronize batch normalization where there is more than one rank.

        Raises:
            GatesError: The strategy is not DDP, the only one whose gate gradients are averaged
                here.
        """
        if stage != "fit":
            return
        strategy = self.trainer.strategy
        if not isinstance(strategy, DDPStrategy | SingleDeviceStrategy):
            raise GatesError(
                f"gradient routing trains on one device or with trainer.strategy ddp, not with"
                f" {type(strategy).__name__}"
            )
        if self.sync_batch_norm and self.trainer.world_size > 1:
            SyncBatchNorm.convert(self.model)

    def forward(self, batch: Batch) -> Tensor:
        """Return the raw output (B, outputs) of a batch."""
        return self.model(batch["streams"], batch.get("geometry"))

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Take one step of gates and weights."""
        routing = self.routing
        assert routing is not None
        parts = split(batch, self.accumulate)
        progress = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        progress.increment_ready()  # one step of the Trainer, whatever the number of optimizers
        step = routing.step(
            self.model, self._losses(parts, self.target), self._losses(parts, self.gate_target)
        )
        progress.increment_completed()
        batches = self.trainer.num_training_batches
        if not isinstance(batches, int):
            raise GatesError("the learning rate schedule needs a data loader of known length")
        schedule: Any = self.lr_schedulers()
        schedule.step(self.trainer.current_epoch + batch_idx / batches)
        self._log_step(step, len(batch["size_mm"]))

    def _log_step(self, step: RoutedStep, size: int) -> None:
        if self.gradient_routing == "every_k" and step.gate_loss is None:
            nothing = step.loss.new_tensor(torch.nan)  # else the last value would be logged again
            norm = None if self.gate_clip is None else nothing
            step = step._replace(gate_loss=nothing, gate_grad_norm=norm)
        self.log("train/loss", step.loss, prog_bar=True, batch_size=size)
        for name in ("gate_loss", "grad_norm", "gate_grad_norm"):
            if (value := getattr(step, name)) is not None:
                self.log(f"train/{name}", value, batch_size=size)

    def _losses(self, parts: list[Batch], target: SizeTarget) -> list[Loss]:
        """Return the losses of the parts, whose mean is that of the whole batch."""
        total = sum(len(part["size_mm"]) for part in parts)
        shares = [len(part["size_mm"]) * len(parts) / total for part in parts]
        return [
            partial(self._loss, part=part, target=target, share=share)
            for part, share in zip(parts, shares, strict=True)
        ]

    def _loss(self, model: nn.Module, part: Batch, target: SizeTarget, share: float) -> Tensor:
        raw = model(part["streams"], part.get("geometry"))
        loss = share * target.loss(raw, part["size_mm"], part.get("censored"))
        return loss + self.l0_weight * self._penalty(model) if self.l0_weight else loss

    def _penalty(self, model: nn.Module) -> Tensor:
        return torch.stack([gate.l0_penalty() for gate in gates_of(model).values()]).sum()

    def on_train_epoch_end(self) -> None:
        """Log the spread of the gate scores."""
        gates = gates_of(self.model).values()
        if not gates:
            return
        scores = torch.cat([gate.scores().detach() for gate in gates])
        low, high = scores.quantile(scores.new_tensor([0.05, 0.95]))
        closed = (scores < NEARLY_CLOSED).float().mean()
        for name, value in (
            ("mean", scores.mean()),
            ("low", low),
            ("high", high),
            ("nearly_closed", closed),
        ):
            self.log(f"gate/{name}", value, sync_dist=True)  # equal on all ranks

    def validation_step(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002
        """Predict the frames of a batch."""
        raw, mm = self(batch), batch["size_mm"]
        censored = batch.get("censored", torch.zeros_like(mm, dtype=torch.bool))
        loss = self.target.loss(raw, mm, censored)
        self.log("val/loss", loss, sync_dist=True, batch_size=len(mm))
        columns = (batch["object"], batch["frame"], mm, censored, self.target.decode(raw))
        self._rows.append(torch.stack([column.double() for column in columns], 1))

    def on_validation_epoch_end(self) -> None:
        """Score the objects of all ranks."""
        rows = gather_rows(torch.cat(self._rows))
        self._rows.clear()
        scores = object_scores(rows, self.cut_offs)
        self.log("val/mae_mm", scores.mae_mm, prog_bar=True, sync_dist=True)
        self.log("val/macro_f1", scores.macro_f1, prog_bar=True, sync_dist=True)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:  # noqa: ARG002
        """Return ``predicted_mm`` (B,), ``object`` and ``frame``, ``probabilities`` of classes."""
        raw = self(batch)
        outputs: dict[str, Tensor] = {"predicted_mm": self.target.decode(raw)}
        outputs |= {name: batch[name] for name in ("object", "frame") if name in batch}
        probabilities = self.target.probabilities(raw)
        return outputs if probabilities is None else {**outputs, "probabilities": probabilities}

    def configure_optimizers(self) -> tuple[list[Optimizer], list[Any]]:
        """Return optimizers of weights and gates, and the cosine schedule; set up gradient routing.

        Raises:
            GatesError: The number of epochs is not given.
        """
        epochs = self.trainer.max_epochs
        if epochs is None or epochs < 1:
            raise GatesError("the learning rate schedule needs a length: set trainer.max_epochs")
        make = OPTIMIZERS[self.optimizer_name]
        weights = [p for p in weight_parameters(self.model).values() if p.requires_grad]
        gates = [p for p in gate_parameters(self.model).values() if p.requires_grad]
        optimizers = [make(weights, lr=self.learning_rate, weight_decay=self.weight_decay)]
        if gates:
            optimizers.append(make(gates, lr=self.gate_learning_rate, weight_decay=0.0))
        schedule = warm_restarts(optimizers[0], epochs, self.cycles, self.min_learning_rate)
        distributed = isinstance(self.trainer.strategy, DDPStrategy)
        self.routing = GradientRouting(
            optimizers[0],
            optimizers[1] if gates else None,
            mode=self.gradient_routing,
            clip=self.clip,
            gate_clip=self.gate_clip,
            every_k=self.every_k,
            scaler=getattr(self.trainer.precision_plugin, "scaler", None),
            group=dist.group.WORLD if distributed else None,
            backward=self.manual_backward if distributed else None,
        )
        if self._resumed is not None:
            self.routing.load_state_dict(self._resumed)
        return optimizers, [schedule]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the count of steps; the Trainer saves optimizers, schedule and scaler."""
        if self.routing is not None:
            checkpoint["gradient_routing"] = self.routing.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the count of steps."""
        self._resumed = checkpoint.get("gradient_routing")
        if self.routing is not None and self._resumed is not None:
            self.routing.load_state_dict(self._resumed)


def split(batch: Batch, count: int) -> list[Batch]:
    """Cut a batch into at most ``count`` parts of nearly equal size, in order."""
    if count == 1:
        return [batch]
    length = len(batch["size_mm"])
    parts: list[Batch] = []
    for rows in torch.arange(length).tensor_split(min(count, length)):
        first, last = int(rows[0]), int(rows[-1]) + 1
        parts.append({name: _rows(value, first, last) for name, value in batch.items()})
    return parts


def _rows(value: Any, first: int, last: int) -> Any:
    if isinstance(value, dict):
        return {name: _rows(item, first, last) for name, item in value.items()}
    return value[first:last]
