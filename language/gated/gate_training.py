"""Training of the output gates of a model of transformers, alone or with parts of the model."""

import copy
import io
import math
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core_gates.errors import GatesError
from harness.files.piece import Piece
from language.data import LanguageDataModule, WindowLoader
from language.gated.attach import CHILD, OutputGate, attach_output_gate, detach_output_gate
from language.gated.state import save_gates
from language.hf.gate_file import read_tensors
from language.hf.locate import attached, locate_attention
from language.module import LanguageModule
from language.tokenizer import Tokenizer

Trained = Literal["gates", "projections", "all"]
FILE, FOLDER = "gates.safetensors", "model"
GATE_OPTIONS = ("granularity", "sharing", "form", "activation", "bias_init")
"""Settings that are options of :func:`language.gated.attach.attach_output_gate`."""

MEASURED = 32  # held-out windows that are measured before and after


class GatedModel(nn.Module):
    """A model of transformers of which parts are trained; its state is that of these parts.

    Args:
        model: With output gates, or without where more than gates is trained.
        train: ``gates`` alone, ``projections``, which the gates and the output projections after
            them are, or ``all``.
        context: The most tokens that it reads; None where nothing limits them.

    Shape:
        ``tokens`` (B, T) to logits (B, T, V).
    """

    def __init__(self, model: Any, train: Trained, context: int | None) -> None:
        super().__init__()
        self.context = float("inf") if context is None else context
        self._whole = (model,)  # in a tuple, else all of it would become the state
        gates = attached(model, CHILD, OutputGate)
        parts: dict[str, nn.Module] = {f"{n}.gate": gate for n, gate in gates.items()}
        if train == "projections":
            for attention in locate_attention(model):
                module = getattr(attention.module, attention.projection)
                parts[f"{attention.name}.{attention.projection}"] = module
        model.requires_grad_(train == "all")
        self.parts = nn.ModuleDict(
            {"model": model}
            if train == "all"
            else {name.replace(".", "-"): part for name, part in parts.items()}
        ).requires_grad_(True)
        self.parts.train()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the rest of the model with the parts that are trained."""
        self._whole[0]._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the token after each token."""
        logits: Tensor = self._whole[0](tokens, use_cache=False).logits
        return logits


class GatesForm:
    """``gates.safetensors``, and ``model/`` where more than gates was trained."""

    def save(self, folder: Path, result: Any) -> None:
        """Write the gates of a model; with a tokenizer, the rest of the model as well."""
        model, tokenizer = result
        save_gates(model, folder / FILE)
        if tokenizer is not None:
            detach_output_gate(model)
            with redirect_stderr(io.StringIO()):  # a progress bar
                model.save_pretrained(folder / FOLDER)
            tokenizer.save(folder / FOLDER)

    def load(self, folder: Path) -> dict[str, Tensor]:
        """Return the parameters of the gates by name.

        Raises:
            GatesError: They are missing or damaged.
        """
        return read_tensors(folder / FILE)[1]


class Fit(Protocol):
    """What a training needs of :class:`harness.experiment.Job`."""

    def note(self, **facts: Any) -> None:
        """Keep facts for the record."""

    def fit(self, module: L.LightningModule, data: L.LightningDataModule, **options: Any) -> Any:
        """Train a module."""


def train_gates(
    piece: Piece,
    job: Fit,
    model: Any,
    data: LanguageDataModule,
    context: int | None,
    **trainer: Any,
) -> tuple[Any, Tokenizer | None]:
    """Attach output gates to a model and train them.

    Bits per token of held-out windows, before gates are attached and after training, are noted.
    Where more than gates is trained, the same training of the same parts without gates comes first,
    and is noted as well: what both gain is not due to gates. Several processes do not do that, as
    they can train only once.

    Args:
        piece: With the settings of the gates, ``train``, ``steps``, ``learning_rate`` and
            ``warmup_steps``.
        job: Trains.
        model: A causal language model of transformers without output gates.
        data: The corpus, in tokens of the model, read.
        context: The most tokens that the model reads.
        trainer: Where it is trained, arguments of the Trainer.

    Returns:
        The model with gates, and its tokenizer where more than gates was trained.

    Raises:
        GatesError: The model does not fit, or has gates already.
    """
    alone, held_out = piece["train"] == "gates", data.val_dataloader()

    def trained(model: Any) -> list[float]:
        L.seed_everything(piece.seed, verbose=False)
        module = LanguageModule(
            GatedModel(model, piece["train"], context),  # type: ignore[arg-type]
            piece["learning_rate"],
            warmup_steps=piece["warmup_steps"],
        )
        job.fit(
            module, data, ticks="steps", max_steps=piece["steps"], max_epochs=-1,
            gradient_clip_val=1.0, limit_val_batches=0, **trainer,
        )  # fmt: skip
        return bits_per_token(model, held_out)

    before = bits_per_token(model, held_out)
    control = {} if alone or trainer else {"bits_without": trained(copy.deepcopy(model))}
    L.seed_everything(piece.seed, verbose=False)
    options = {name: piece.get(name) for name in GATE_OPTIONS}
    attach_output_gate(model, **options, dtype=torch.float32)
    found = {"bits_before": before, "bits_after": trained(model), **control}
    job.note(objects=data.training_objects(), **found)
    return model, None if alone else data.shards.tokenizer


def bits_per_token(model: Any, held_out: WindowLoader) -> list[float]:
    """Return the mean bits per token of held-out windows at even distances, 32 at most.

    Raises:
        GatesError: They are not finite.
    """
    place, found, size = next(model.parameters()).device, [], held_out.context
    starts = held_out.starts()
    for number in np.linspace(0, len(starts) - 1, min(MEASURED, len(starts))).round().astype(int):
        window = held_out.tokens[starts[number] : starts[number] + size + 1].astype(np.int64)
        tokens = torch.from_numpy(window).to(place)
        with torch.inference_mode():
            logits = model(tokens[None, :-1], use_cache=False).logits[0].float()
        found.append(float(F.cross_entropy(logits, tokens[1:])) / math.log(2))
    if not np.isfinite(found).all():
        raise GatesError(
            f"the model needs {np.mean(found)} bits per held-out token, expected a finite number:"
            " lower --learning_rate, or give another model"
        )
    return found
