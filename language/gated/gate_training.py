"""Training of the output gates of a model of transformers, next to a LoRA of the same size."""

import copy
import io
import math
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, Protocol, Self

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from core_gates.adapters.sparse_low_rank import SparseLoraLinear, rank_gates, sizes_of
from core_gates.errors import GatesError
from harness.files.piece import Piece
from language.data import LanguageDataModule, WindowLoader
from language.gated.attach import CHILD, OutputGate, attach_output_gate, detach_output_gate
from language.gated.state import save_gates
from language.hf.gate_file import read_tensors
from language.hf.locate import attached, locate_attention
from language.hf.lora import sora_layers
from language.module import LanguageModule
from language.tokenizer import Tokenizer

Trained = Literal["gates", "projections", "all"]
FILE, FOLDER = "gates.safetensors", "model"
GATE_OPTIONS = ("granularity", "sharing", "form", "activation", "bias_init")
"""Settings that are options of `language.gated.attach.attach_output_gate`."""

MEASURED = 32  # held-out windows that are measured before and after
SCALE = 2.0  # of what a LoRA adds


class GatedModel(nn.Module):
    """A model of transformers of which parts are trained; its state is that of these parts.

    Args:
        model: With output gates, or with LoRAs instead, see `attach_loras`; or with neither
            where all of it is trained.
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
        loras = {name: layer.adapter for name, layer in sora_layers(model).items()}
        gates: Mapping[str, nn.Module] = loras or attached(model, CHILD, OutputGate)
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
        for gate in rank_gates(self.parts):
            gate.requires_grad_(False)  # those of LoRAs stay one

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
    """What a training needs of `harness.experiment.Job`."""

    def note(self, **facts: Any) -> None:
        """Add facts to the record of the result."""

    def fit(self, module: L.LightningModule, data: L.LightningDataModule, **options: Any) -> Any:
        """Train a module, and return it."""


def attach_loras(model: Any, size: int) -> Any:
    """Put LoRAs on the output projections of a model, which do nothing at the start.

    Args:
        model: A causal language model of transformers.
        size: Parameters of all together, by which the ranks of layers differ by one at most.

    Returns:
        The same model.
    """
    attentions = locate_attention(model)
    places = [getattr(attention.module, attention.projection) for attention in attentions]
    total = max(1, round(size * len(places) / sum(sum(sizes_of(place)) for place in places)))
    ranks = np.diff(np.arange(len(places) + 1) * total // len(places)).tolist()
    for attention, place, rank in zip(attentions, places, ranks, strict=True):
        lora = SparseLoraLinear(place, rank, alpha=SCALE * max(1, rank), initialization="ones")
        setattr(attention.module, attention.projection, lora)
    return model


def train_gates(
    piece: Piece,
    job: Fit,
    model: Any,
    data: LanguageDataModule,
    context: int | None,
    **trainer: Any,
) -> tuple[Any, Tokenizer | None]:
    """Attach output gates to a model and train them.

    They are trained once at each rate; those that need the fewest bits for validation windows are
    returned. The same training with LoRAs on the output projections instead, of as many parameters
    as gates, comes first: what both gain is not due to gates. Noted are the bits per token of test
    windows before, with gates and with LoRAs, and the document of each window. Several processes
    train gates alone, at a single rate, as they can train only once.

    Args:
        piece: With the settings of the gates, ``train``, ``steps``, ``rates`` and ``warmup_steps``.
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
    tested = data.test_dataloader()
    stops = [stop for _, _, stop in data.shards.documents("test")]
    files = np.searchsorted(stops, measured(tested) + tested.context // 2, side="right")
    job.note(before={"bits": bits_per_token(model, tested)}, files=files.tolist())
    controls = [] if trainer else [copy.deepcopy(model)]
    L.seed_everything(piece.seed, verbose=False)
    options = {name: piece.get(name) for name in GATE_OPTIONS}
    gates = attach_output_gate(model, **options, dtype=torch.float32)
    for control in controls:
        size = sum(p.numel() for gate in gates.values() for p in gate.parameters())
        _train_best("lora", attach_loras(control, size), piece, job, data, context)
    _train_best("gates", model, piece, job, data, context, **trainer)
    job.note(objects=data.training_objects())
    return model, None if piece["train"] == "gates" else data.shards.tokenizer


def _train_best(
    name: str, model: Any, piece: Piece, job: Fit, data: LanguageDataModule, context: int | None,
    **trainer: Any,
) -> None:  # fmt: skip
    """Train what was added to a model at every rate, leave it with the best, and note that."""
    module = GatedModel(model, piece["train"], context)
    chosen_by, tested = data.val_dataloader(), data.test_dataloader()
    trials: dict[float, float] = {}
    start = copy.deepcopy(module.state_dict())
    for rate in piece["rates"]:
        module.train().load_state_dict(start)
        L.seed_everything(piece.seed, verbose=False)
        job.fit(
            LanguageModule(module, rate, warmup_steps=piece["warmup_steps"]),  # type: ignore[arg-type]
            data, ticks="steps", max_steps=piece["steps"], max_epochs=-1,
            gradient_clip_val=1.0, limit_val_batches=0, **trainer,
        )  # fmt: skip
        trials[rate] = fmean(bits_per_token(model, chosen_by))
        if trials[rate] == min(trials.values()):
            won = rate, copy.deepcopy(module.state_dict())
    module.load_state_dict(won[1])
    size = sum(p.numel() for p in module.parameters() if p.requires_grad)
    tried = {str(rate): bits for rate, bits in trials.items()}
    bits = bits_per_token(model, tested)
    job.note(**{name: {"bits": bits, "rate": won[0], "size": size, "trials": tried}})


def measured(held_out: WindowLoader) -> NDArray[np.int64]:
    """Return the first tokens of at most 32 evenly spaced held-out windows."""
    starts = held_out.starts()
    places = np.linspace(0, len(starts) - 1, min(MEASURED, len(starts))).round()
    return starts[places.astype(int)]


def bits_per_token(model: Any, held_out: WindowLoader) -> list[float]:
    """Return the mean bits per token of held-out windows at even distances, 32 at most.

    Raises:
        GatesError: They are not finite.
    """
    place, bits, size = next(model.parameters()).device, [], held_out.context
    for start in measured(held_out):
        window = held_out.tokens[start : start + size + 1].astype(np.int64)
        tokens = torch.from_numpy(window).to(place)
        with torch.inference_mode():
            logits = model(tokens[None, :-1], use_cache=False).logits[0].float()
        bits.append(float(F.cross_entropy(logits, tokens[1:])) / math.log(2))
    if not np.isfinite(bits).all():
        raise GatesError(
            f"the model needs {np.mean(bits)} bits per held-out token, expected a finite number:"
            " lower --learning_rate, or give another model"
        )
    return bits
