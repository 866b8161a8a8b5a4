"""What the vector of an adapter must not depend on: gauge, padding, dialect, names, metadata."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.nn import functional as F

from diffusion.evaluation.parity.worst import Check, relative_error, worst
from diffusion.lora_file import Factors, FluxShape, LoraBundle, load_lora, save_lora
from diffusion.retrieval import EncoderConfig, LoraWeightEncoder, TrainedEncoder

SHAPE = FluxShape(
    num_layers=1, num_single_layers=2, num_heads=2, head_dim=8, context_dim=16, pooled_dim=16,
    guidance=False,
)  # fmt: skip
SMALL: dict[str, Any] = {"text_dim": 24, "dim": 16, "heads": 2, "head_dim": 8, "hidden_dim": 32}
FORMS: dict[str, dict[str, Any]] = {
    "default": {},
    "token normalization": {"normalization": "token"},
    "layer normalization": {"normalization": "layer"},
    "masked": {"missing": "mask"},
    "prompt token": {"pooling": "token", "probes": 3, "positions": False},
    "causal": {"attention_mask": "causal", "normalization": "none"},
}
"""Forms of the encoder, by their options."""

DIALECTS = ("diffusers", "kohya", "bfl", "comfyui", "peft")
ADAPTERS = ((1, 1), (2, 3), (3, 4))
"""Seeds and ranks of the adapters."""


def small_encoder(form: str) -> TrainedEncoder:
    """Return an encoder of one form with drawn weights."""
    torch.manual_seed(0)
    encoder = LoraWeightEncoder(EncoderConfig(SHAPE, **SMALL, **FORMS[form]))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return TrainedEncoder(encoder)


def block_adapter(seed: int, rank: int = 2, shape: FluxShape = SHAPE) -> LoraBundle:
    """Return a random adapter of all layers of blocks."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for module in shape.fused():
        for part, size in zip(module.parts, module.sizes, strict=True):
            down = torch.randn(rank, module.in_features, generator=generator)
            layers[part] = Factors(down, torch.randn(size, rank, generator=generator), 0.5)
    return LoraBundle("flux", layers, metadata={"ss_output_name": "secret", "ss_tag": "red"})


def changed(bundle: LoraBundle, change: Callable[[Factors], Factors]) -> LoraBundle:
    """Return an adapter with every layer changed."""
    layers = {name: change(factors) for name, factors in bundle.modules.items()}
    return dataclasses.replace(bundle, modules=layers)


def regauged(bundle: LoraBundle, seed: int) -> LoraBundle:
    """Return the same ΔW by other factors, ``R A`` and ``B R⁻¹`` with an invertible R."""
    generator = torch.Generator().manual_seed(seed)

    def turned(one: Factors) -> Factors:
        turn = torch.randn(one.rank, one.rank, generator=generator) + 3 * torch.eye(one.rank)
        up = torch.linalg.solve(turn.double().mT, one.up.double().mT).mT.float()
        return one._replace(down=turn @ one.down, up=up)

    return changed(bundle, turned)


def padded(bundle: LoraBundle) -> LoraBundle:
    """Return the same ΔW at a rank that is two higher."""
    return changed(
        bundle, lambda f: f._replace(down=F.pad(f.down, (0, 0, 0, 2)), up=F.pad(f.up, (0, 2)))
    )


def same_adapters(bundle: LoraBundle, folder: Path) -> Iterator[tuple[str, LoraBundle]]:
    """Yield the same adapter by other factors, from other files, and without metadata."""
    yield "gauge", regauged(bundle, 7)
    yield "padded rank", padded(bundle)
    yield "moved scale", changed(bundle, lambda f: f._replace(down=4 * f.down, scale=f.scale / 4))
    yield "no metadata", dataclasses.replace(bundle, metadata={})
    for number, format in enumerate(DIALECTS):
        path = folder / (f"{number}" if format == "peft" else f"{number}.safetensors")
        save_lora(bundle, path, format)
        yield f"{format}, named {path.stem}", load_lora(path)


def vector_errors(form: str) -> Iterator[tuple[str, float]]:
    """Yield the errors of the vectors of one form of the encoder."""
    encoder = small_encoder(form)
    vectors = []
    for seed, rank in ADAPTERS:
        bundle = block_adapter(seed, rank)
        vectors.append(encoder.encode(bundle))
        with TemporaryDirectory() as folder:
            for name, other in same_adapters(bundle, Path(folder)):
                error = relative_error(encoder.encode(other), vectors[-1])
                yield f"{form}, rank {rank}, {name}", error
    apart = min(float((a - b).abs().max()) for a in vectors for b in vectors if a is not b)
    yield f"{form}: other adapters differ", 0.0 if apart > 1e-3 else float("inf")


def check_embeddings(folder: str | Path) -> dict[str, Check]:
    """Encode the same adapters in many ways."""
    del folder
    errors = [one for form in FORMS for one in vector_errors(form)]
    return {"embeddings under gauge, rank, dialect, names and metadata": worst(errors)}
