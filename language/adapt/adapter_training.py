"""Training of adapters and heads of a model on labeled texts, and rivals of equal size."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from core_gates.adapters.sparse_low_rank import rank_gates
from core_gates.errors import GatesError
from core_gates.training import ThresholdSchedule
from harness.files.piece import Piece
from language.adapt.components import (
    adapters_of,
    cut,
    drawn_strengths,
    learned_strengths,
    masks_of,
    overlap,
    size_of,
    strongest,
)
from language.adapt.labeled_texts import LabeledTexts, Row
from language.gated.gate_training import Fit
from language.hf.classifier import encode_texts, open_classifier
from language.hf.lora import attach_sora, freeze_base, heads_of, load_sora, save_sora
from language.seer.distillation import RecordData

Method = Literal["head", "lora", "sora", "magnitude", "draw"]
FILE = "adapter.safetensors"
CLIP = 1.0  # of the norm of gradients
LABEL = "labels"
ALIKE = 8  # rows of like length


class AdapterModule(L.LightningModule):
    """Adapters and heads of a classifier, trained by AdamW; its state is that of these parts.

    The rest of the model is frozen and in evaluation mode, without dropout. Matrices decay; gates
    have their own learning rate. Logged is ``train/loss``.

    Args:
        model: A classifier of transformers, what is trained requires gradients.
        learning_rate: The largest learning rate of factors and heads.
        gate_rate: The largest learning rate of gates.
        weight_decay: Decoupled weight decay of matrices.
        thresholds: ξ of each stage, each of which begins with the learning rate again.
        stage_steps: Steps of a stage.
        counts: Whether labels are numbers of classes.
        kept: See `core_gates.training.ThresholdSchedule`.
    """

    def __init__(
        self, model: Any, *, learning_rate: float, gate_rate: float, weight_decay: float,
        thresholds: Sequence[float], stage_steps: int, counts: bool, kept: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self._whole = (model,)  # in a tuple, else all of it would become the state
        heads = {head: model.get_submodule(head) for head in heads_of(model)}
        parts: dict[str, nn.Module] = {**adapters_of(model), **heads}
        self.parts = nn.ModuleDict({n.replace(".", "-"): part for n, part in parts.items()}).train()
        self.rates = {"lr": learning_rate, "gates": gate_rate, "decay": weight_decay}
        self.thresholds, self.stage_steps = list(thresholds), stage_steps
        self.counts, self.kept = counts, kept

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the rest of the model with the parts that are trained."""
        self._whole[0]._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:  # noqa: ARG002
        """Return the cross-entropy of a batch, or the mean squared error of its numbers.

        Raises:
            GatesError: It is not finite.
        """
        logits = logits_of(self._whole[0], batch)
        target = batch[LABEL]
        loss = (
            F.cross_entropy(logits, target.long())
            if self.counts
            else F.mse_loss(logits[:, 0], target)
        )
        if not loss.isfinite():
            raise GatesError(
                f"the loss of step {self.global_step + 1} is {loss.item()}: lower --learning_rate"
            )
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return AdamW, whose steps shrink gates, and the schedule of its learning rates."""
        gates = [gate for gate in rank_gates(self.parts) if gate.requires_grad]
        of_gates = {id(gate) for gate in gates}
        others = [p for p in self.parameters() if p.requires_grad and id(p) not in of_gates]
        groups = [
            {"params": [p for p in others if p.ndim > 1], "weight_decay": self.rates["decay"]},
            {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
            {"params": gates, "weight_decay": 0.0, "lr": self.rates["gates"]},
        ]
        optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], self.rates["lr"]
        )
        self._schedule = ThresholdSchedule(
            optimizer, gates, self.thresholds, self.stage_steps, kept=self.kept
        )
        schedule = {"scheduler": LambdaLR(optimizer, self._schedule.rate), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}  # type: ignore[typeddict-item]

    def on_train_start(self) -> None:
        """Continue the thresholds at the step of the checkpoint."""
        self._schedule.load_state_dict({"num_steps": self.global_step})


def logits_of(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the outputs (B, C) of a padded batch, whose padding is cut to the longest row.

    On a CPU rows of like length are computed together, with less padding.
    """
    lengths = batch["attention_mask"].sum(1)
    order = lengths.argsort(stable=True)
    logits = []
    for places in order.split(ALIKE if lengths.is_cpu else len(order)):
        width = int(lengths[places].max())
        inputs = {n: value[places, :width] for n, value in batch.items() if n != LABEL}
        logits.append(model(**inputs).logits.float())
    return torch.cat(logits)[order.argsort()]


def encoded(
    folder: Path, texts: LabeledTexts, rows: Sequence[Row], context: int
) -> dict[str, Tensor]:
    """Return the tokens of rows (N, T) and their ``labels`` (N,).

    Raises:
        GatesError: The model has no tokenizer or reads fewer tokens.
    """
    encoded = encode_texts(folder, [row.texts for row in rows], context)
    return {**encoded, LABEL: torch.tensor(texts.targets(rows))}


@torch.no_grad()
def outputs_of(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the outputs (N, C) of rows of any number, in their order, on a CPU."""
    return logits_of(model, inputs)


def train_adapter(
    piece: Piece, job: Fit, folder: Path, texts: LabeledTexts, sources: Mapping[str, Path],
    **trainer: Any,
) -> Any:  # fmt: skip
    """Train or cut adapters of a model, and return it with them.

    Noted are ``classes``, empty for a number, and ``texts``, their number in a row; what is kept of
    adapters, and how much of that is what was drawn largest.

    Args:
        piece: Its method, seed and settings: ``rank``, ``alpha``, ``context``, ``steps``,
            ``stages``, ``batch_size``, ``learning_rate``, ``gate_rate``, ``weight_decay``, for
            ``sora`` ``thresholds`` and ``kept``, None where they are fixed; for ``magnitude`` and
            ``draw`` the ``size`` that remains.
        job: Trains.
        folder: Of the model.
        texts: What it is trained on.
        sources: Files of adapters by the fingerprints that pieces call ``start``.
        trainer: Where it is trained, arguments of the Trainer.

    Raises:
        GatesError: The model, texts or settings do not fit.
    """
    L.seed_everything(piece.seed, verbose=False)
    model = open_classifier(folder, texts.outputs, piece.seed or 0)
    if piece.method == "magnitude":
        load_sora(model, sources[piece["start"]])
        cut(model, strongest(model, learned_strengths(model), piece["size"]))
    else:
        drawn = _attach(model, piece)
        module = AdapterModule(
            model, learning_rate=piece["learning_rate"], gate_rate=piece.get("gate_rate", 1.0),
            weight_decay=piece["weight_decay"],
            thresholds=piece.get("thresholds", [0.0] * piece["stages"]),
            stage_steps=piece["steps"] // piece["stages"],
            counts=bool(texts.classes), kept=piece.get("kept"),
        )  # fmt: skip
        rows = encoded(folder, texts, texts.train, piece["context"])
        data = RecordData(
            lambda number: {name: value[number] for name, value in rows.items()},
            len(texts.train), piece["batch_size"], seed=piece.seed or 0,
        )  # fmt: skip
        job.fit(
            module, data, ticks="steps", max_steps=piece["steps"], max_epochs=-1,
            gradient_clip_val=CLIP, limit_val_batches=0, **trainer,
        )  # fmt: skip
        if piece.method == "sora":
            kept = masks_of(model)
            job.note(drawn=overlap(kept, strongest(model, drawn, size_of(model))))
    masks = masks_of(model).values()
    job.note(
        kept=sum(int(mask.sum()) for mask in masks), gates=sum(map(len, masks)),
        size=size_of(model), classes=list(texts.classes), texts=len(texts.train[0].texts),
    )  # fmt: skip
    return model


def _attach(model: Any, piece: Piece) -> dict[str, Tensor]:
    """Attach what a method trains, and return the magnitudes that gates start with, if any."""
    if piece.method == "head":
        freeze_base(model)
        return {}
    gated = piece.method != "lora"
    layers = attach_sora(
        model,
        rank=piece["rank"],
        alpha=piece["alpha"],
        initialization="normal" if gated else "ones",
    )
    drawn = drawn_strengths(model)
    if not gated:
        for layer in layers.values():
            layer.adapter.lora_gate.requires_grad_(False)
    if piece.method == "draw":
        cut(model, strongest(model, drawn, piece["size"]))
    return drawn


def write_adapter(folder: Path, model: Any) -> None:
    """Write the adapters and heads of a model."""
    save_sora(model, folder / FILE)
