"""The encoder of adapters and the loss as published: values, loss and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusion.evaluation.parity.golden.vectors import read_vectors
from diffusion.evaluation.parity.worst import Check, relative_error, worst
from diffusion.lora_file import Factors, FluxShape, LoraBundle
from diffusion.retrieval.batch import AdapterBatch, collate
from diffusion.retrieval.config import EncoderConfig
from diffusion.retrieval.encoder import LoraWeightEncoder
from diffusion.retrieval.losses import PublishedLoss


class Published(NamedTuple):
    """The encoder and the adapters of the vectors.

    Attributes:
        arrays: The vectors.
        order: Names of the layers in the order of the published code.
        types: Of these layers.
        encoder: With the weights of the vectors.
        batch: The adapters, split into the layers of diffusers.
    """

    arrays: dict[str, Tensor]
    order: list[str]
    types: list[str]
    encoder: LoraWeightEncoder
    batch: AdapterBatch


def published_encoder(folder: str | Path) -> Published:
    """Return what ``encoder_a.npz`` describes."""
    arrays, meta = read_vectors(folder, "encoder_a.npz")
    shape = FluxShape(meta["n_double"], meta["n_single"], num_heads=1, head_dim=meta["d"])
    config = EncoderConfig.published(
        shape, dim=meta["embed"], heads=meta["heads"], head_dim=meta["head_dim"],
        hidden_dim=meta["inter"], depth=meta["layers"], probes=meta["probes"],
    )  # fmt: skip
    encoder = LoraWeightEncoder(config).double()
    weights = {key[2:]: value for key, value in arrays.items() if key.startswith("w.")}
    encoder.load_state_dict(weights, strict=True)
    bundles = []
    for k in range(len(arrays["emb"])):
        layers = {}
        for module in encoder.modules_read:
            down = arrays[f"lora{k}.{module.name}.lora_A.weight"]
            up = arrays[f"lora{k}.{module.name}.lora_B.weight"]
            for part, rows in zip(module.parts, up.split(module.sizes), strict=True):
                layers[part] = Factors(down, rows)
        bundles.append(LoraBundle("flux", layers))
    batch = collate(bundles, encoder.modules_read, torch.float64)
    return Published(arrays, meta["order"], meta["types"], encoder, batch)


def encoder_errors(given: Published) -> Iterator[tuple[str, float]]:
    """Yield the relative error of tokens, vectors, similarities, the loss and each gradient."""
    arrays, encoder = given.arrays, given.encoder
    found_order = [(m.name, m.type) for m in encoder.modules_read]
    same = found_order == list(zip(given.order, given.types, strict=True))
    yield "order of the layers", 0.0 if same else float("inf")
    tokens, _ = encoder.tokens(given.batch)
    yield "tokens", relative_error(tokens[-1:], arrays["tokens0"])
    vectors = encoder(given.batch)
    yield "vectors", relative_error(vectors, arrays["emb"])
    similarity = F.normalize(arrays["text"]) @ F.normalize(vectors).mT
    yield "similarities", relative_error(similarity, arrays["sim"])
    loss = PublishedLoss()(arrays["text"], vectors)
    yield "loss", relative_error(loss, arrays["loss"])
    encoder.zero_grad()
    loss.backward()
    named = dict(encoder.named_parameters())
    for key, gradient in arrays.items():
        if key.startswith("g."):
            own = named[key[2:]].grad
            yield key, float("inf") if own is None else relative_error(own, gradient)


def check_encoder(folder: str | Path) -> dict[str, Check]:
    """Compare with ``encoder_a.npz``."""
    errors = dict(encoder_errors(published_encoder(folder)))
    gradients = {name: error for name, error in errors.items() if name.startswith("g.")}
    values = {name: error for name, error in errors.items() if name not in gradients}
    return {
        "encoder: values and loss": worst(values.items()),
        "encoder: gradients": worst(gradients.items()),
    }
