"""Training by flow matching (Lipman et al., 2023), of a transformer or of low-rank adapters."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from core_gates.errors import GatesError
from core_gates.numerics import accumulation_dtype
from diffusion.lora_file import Factors, LoraBundle
from diffusion.models.text_encoders import TextStates

GUIDANCE = 1.5  # scale of classifier-free guidance of the embedded base; 3 falsifies its colors


class Noised(NamedTuple):
    """Latents on the way to noise.

    Attributes:
        x: (B, C, h, w) ``(1 - t) z + t ε``.
        t: (B,) from 0, the image, to 1, noise.
        target: (B, C, h, w) ``ε - z``, the velocity.
    """

    x: Tensor
    t: Tensor
    target: Tensor


def logit_normal(count: int, device: torch.device | None = None, shift: float = 1.0) -> Tensor:
    """Return times (count,) whose logits are normal, from the global generator.

    Args:
        count: Of times.
        device: Where they are drawn.
        shift: See `shifted`.
    """
    return shifted(torch.randn(count, device=device).sigmoid(), shift)


def shifted(t: Tensor, shift: float) -> Tensor:
    """Return times ``s t / (1 + (s - 1) t)``, later for a shift s above 1 (Esser et al., 2024).

    Images with few details are decided while there is still much noise.
    """
    return shift * t / (1 + (shift - 1) * t)


def noised(latents: Tensor, t: Tensor, noise: Tensor) -> Noised:
    """Return latents (B, C, h, w) at times (B,) on the way to noise of their shape."""
    return Noised(torch.lerp(latents, noise, t.view(-1, 1, 1, 1)), t, noise - latents)


def packed(latents: Tensor) -> Tensor:
    """Return tokens (B, h/2 · w/2, 4C) of latents (B, C, h, w), as FLUX arranges them."""
    batch, channels, height, width = latents.shape
    blocks = latents.view(batch, channels, height // 2, 2, width // 2, 2)
    return blocks.permute(0, 2, 4, 1, 3, 5).reshape(batch, height // 2 * (width // 2), channels * 4)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """Return latents (B, C, height, width) of their tokens."""
    batch, _, features = tokens.shape
    blocks = tokens.view(batch, height // 2, width // 2, features // 4, 2, 2)
    return blocks.permute(0, 3, 1, 4, 2, 5).reshape(batch, features // 4, height, width)


def velocity(transformer: nn.Module, x: Tensor, t: Tensor, text: TextStates) -> Tensor:
    """Return the velocity (B, C, h, w) that a FLUX or SD3 transformer predicts.

    Args:
        transformer: A ``FluxTransformer2DModel`` or ``SD3Transformer2DModel``.
        x: (B, C, h, w) latents.
        t: (B,) times from 0 to 1.
        text: Captions of the batch.
    """
    if type(transformer).__name__.startswith("SD3"):
        return transformer(  # type: ignore[no-any-return]
            hidden_states=x,
            timestep=t * 1000,
            encoder_hidden_states=text.tokens,
            pooled_projections=text.pooled,
            return_dict=False,
        )[0]
    height, width = x.shape[2:]
    guided = transformer.config.guidance_embeds  # type: ignore[union-attr]
    predicted = transformer(
        hidden_states=packed(x),
        timestep=t,
        guidance=torch.ones_like(t) if guided else None,
        pooled_projections=text.pooled,
        encoder_hidden_states=text.tokens,
        txt_ids=x.new_zeros(text.tokens.shape[1], 3),
        img_ids=image_ids(height // 2, width // 2, x),
        return_dict=False,
    )[0]
    return unpacked(predicted, height, width)


def image_ids(height: int, width: int, like: Tensor) -> Tensor:
    """Return the places (height · width, 3) of image tokens: 0, row, column."""
    ids = like.new_zeros(height, width, 3)
    ids[..., 1] = torch.arange(height, device=like.device).unsqueeze(1)
    ids[..., 2] = torch.arange(width, device=like.device)
    return ids.view(-1, 3)


def flow_matching_losses(transformer: nn.Module, at: Noised, text: TextStates) -> Tensor:
    """Return the mean squared error of the velocity of each latent (B,)."""
    predicted = velocity(transformer, at.x, at.t, text)
    dtype = accumulation_dtype(predicted, at.target)
    return (predicted.to(dtype) - at.target.to(dtype)).square().flatten(1).mean(1)


class LatentBatch(NamedTuple):
    """Latents (B, C, h, w) and the states of their captions (B, L, D) and (B, D)."""

    latents: Tensor
    tokens: Tensor
    pooled: Tensor

    @property
    def text(self) -> TextStates:
        """The states of the captions."""
        return TextStates(self.tokens, self.pooled)


class Latents(Dataset[LatentBatch]):
    """Latents in memory, which are looked up a batch at a time.

    Args:
        latents: (N, C, h, w), scaled as the model sees them.
        text: Of their captions.
        rows: Those of an epoch, some of them several times; all once if None.
    """

    def __init__(
        self, latents: Tensor, text: TextStates, rows: Sequence[int] | None = None
    ) -> None:
        if len(latents) != len(text.pooled):
            raise ValueError(f"{len(latents)} latents have {len(text.pooled)} captions")
        self.latents, self.text = latents, text
        self.rows = torch.arange(len(latents)) if rows is None else torch.as_tensor(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, places: list[int]) -> LatentBatch:
        """Return the latents of some places of an epoch."""
        rows = self.rows[places]
        return LatentBatch(self.latents[rows], self.text.tokens[rows], self.text.pooled[rows])


class LatentDataModule(L.LightningDataModule):
    """Shuffled batches of latents that are all in memory.

    Args:
        latents: (N, C, h, w), scaled as the model sees them.
        text: Of their captions.
        batch_size: Of training; fewer where there are fewer latents.
        rows: Those of an epoch, some of them several times; all once if None.
    """

    def __init__(
        self,
        latents: Tensor,
        text: TextStates,
        batch_size: int = 64,
        rows: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.data = Latents(latents, text, rows)
        self.batch_size = min(batch_size, len(self.data))

    def train_dataloader(self) -> DataLoader[LatentBatch]:
        """Return batches in a new order each epoch; what does not fill a batch is left out."""
        batches: Iterable[list[int]] = BatchSampler(
            RandomSampler(self.data), self.batch_size, drop_last=True
        )
        return DataLoader(self.data, sampler=batches, batch_size=None)


class FlowMatchingModule(L.LightningModule):
    """Trains the parameters that require gradients by the loss of flow matching.

    Args:
        transformer: What predicts velocities; its parameters belong to this module only if
            ``parameters`` is None.
        empty: States of the empty caption, of batch size 1.
        parameters: What is trained and saved, by name, where that is not the transformer.
        steps: Steps of the training, over which the learning rate falls linearly to 0.
        learning_rate: Of AdamW, after the warm-up.
        warmup_steps: Steps over which the learning rate rises.
        weight_decay: Of AdamW.
        betas: Of AdamW.
        caption_dropout: Fraction of captions that are left empty, for classifier-free guidance.
        shift: Of the times, see `shifted`.
    """

    def __init__(
        self,
        transformer: nn.Module,
        empty: TextStates,
        parameters: dict[str, nn.Parameter] | None = None,
        *,
        steps: int,
        learning_rate: float = 1.5e-3,
        warmup_steps: int = 80,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.95),
        caption_dropout: float = 0.1,
        shift: float = 1.0,
    ) -> None:
        super().__init__()
        self._transformer = (transformer,)
        if parameters is None:
            self.transformer = transformer
        else:
            for name, parameter in parameters.items():
                self.register_parameter(name.replace(".", "/"), parameter)
        self.empty, self.steps, self.learning_rate = empty, steps, learning_rate
        self.warmup_steps, self.weight_decay, self.betas = warmup_steps, weight_decay, betas
        self.caption_dropout, self.shift = caption_dropout, shift

    def training_step(self, batch: LatentBatch, _: int) -> Tensor:
        """Return the loss of a batch, at logit-normal times."""
        count = len(batch.latents)
        dropped = torch.rand(count, device=self.device) < self.caption_dropout
        text = batch.text.where(dropped, self.empty)
        t = logit_normal(count, self.device, self.shift)
        at = noised(batch.latents, t, torch.randn_like(batch.latents))
        loss = flow_matching_losses(self._transformer[0], at, text).mean()
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        """Return AdamW and a learning rate that rises, then falls linearly to 0."""
        optimizer = torch.optim.AdamW(
            [parameter for parameter in self.parameters() if parameter.requires_grad],
            self.learning_rate,
            betas=self.betas,
            weight_decay=self.weight_decay,
        )

        def factor(step: int) -> float:
            rising = min(1.0, (step + 1) / max(1, self.warmup_steps))
            return rising * max(0.0, 1 - step / self.steps)

        schedule = {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}


NAME = "trained"
DOWN, UP = f".lora_A.{NAME}.weight", f".lora_B.{NAME}.weight"
PARTS: Mapping[str, tuple[str, ...]] = {
    "attention": ("attn.",),
    "mlp": ("ff.", "ff_context.", "proj_mlp", "proj_out"),
    "modulation": ("norm.linear", "norm1.linear", "norm1_context.linear"),
}  # parts of a block -> what the names of their layers begin with, within the block


def layers_of(transformer: nn.Module, parts: Collection[str]) -> list[str]:
    """Return the linear layers in the blocks of a transformer that belong to some parts.

    Args:
        transformer: Of FLUX or SD3, by diffusers.
        parts: Of ``attention``, ``mlp`` and ``modulation``.

    Raises:
        GatesError: There is no such part.
    """
    if unknown := sorted(set(parts) - PARTS.keys()):
        raise GatesError(f"no part of a block is named {unknown[0]!r}: {', '.join(PARTS)}")
    begins = tuple(begin for part in parts for begin in PARTS[part])
    return [
        name
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear)
        and "transformer_blocks." in name
        and name.partition("transformer_blocks.")[2].partition(".")[2].startswith(begins)
    ]


@contextmanager
def trainable_factors(
    transformer: nn.Module, layers: Sequence[str], rank: int
) -> Iterator[dict[str, nn.Parameter]]:
    """Put a new adapter into a transformer, whose own weights are frozen meanwhile.

    Args:
        transformer: A model of diffusers.
        layers: Names of linear layers.
        rank: Of the adapter; its scale is 1.

    Yields:
        Its factors by name.
    """
    from peft import LoraConfig

    transformer.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(layers))
    transformer.add_adapter(config, adapter_name=NAME)  # type: ignore[operator]
    try:
        factors = {n: p for n, p in transformer.named_parameters() if n.endswith((DOWN, UP))}
        for factor in factors.values():
            factor.data = factor.data.float()  # also in a base of bfloat16
        yield factors
    finally:
        transformer.unload_lora()  # type: ignore[operator]


def bundle_of(
    factors: Mapping[str, torch.Tensor],
    family: str,
    metadata: Mapping[str, str],
    dtype: torch.dtype = torch.bfloat16,
) -> LoraBundle:
    """Return the adapter in canonical form.

    Args:
        factors: As `trainable_factors` yields them.
        family: ``flux`` or ``sd3``.
        metadata: Of its file.
        dtype: In which it will be stored.
    """
    modules = {}
    for name, down in factors.items():
        if name.endswith(DOWN):
            layer = name.removesuffix(DOWN)
            rounded = [t.detach().cpu().to(dtype).float() for t in (down, factors[f"{layer}{UP}"])]
            modules[layer] = Factors(rounded[0], rounded[1])
    return LoraBundle(family, modules, metadata=dict(metadata), storage=dtype)
