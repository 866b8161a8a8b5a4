"""The encoder and the loss of the published code, at vectors that it computed."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from diffusion.lora_file import Factors, FluxShape, LoraBundle
from diffusion.lora_file.family.layers import index_of
from diffusion.retrieval.batch import collate
from diffusion.retrieval.config import EncoderConfig
from diffusion.retrieval.encoder import LoraWeightEncoder
from diffusion.retrieval.losses import PublishedLoss

VECTORS = Path(__file__).parents[2] / "golden/autolora/encoder_a.npz"
TOLERANCE = {"rtol": 1e-6, "atol": 1e-9}


@pytest.fixture(scope="module")
def golden():
    with np.load(VECTORS) as arrays:
        found = {key: torch.from_numpy(arrays[key]) for key in arrays.files if key != "meta"}
        return found, json.loads(str(arrays["meta"]))


@pytest.fixture(scope="module")
def encoder(golden):
    arrays, meta = golden
    shape = FluxShape(meta["n_double"], meta["n_single"], num_heads=1, head_dim=meta["d"])
    config = EncoderConfig.published(
        shape, dim=meta["embed"], heads=meta["heads"], head_dim=meta["head_dim"],
        hidden_dim=meta["inter"], depth=meta["layers"], probes=meta["probes"],
    )  # fmt: skip
    encoder = LoraWeightEncoder(config).double()
    weights = {key[2:]: value for key, value in arrays.items() if key.startswith("w.")}
    encoder.load_state_dict(weights, strict=True)
    return encoder


@pytest.fixture(scope="module")
def batch(golden, encoder):
    """The adapters of the vectors, split into the layers of diffusers."""
    arrays, _ = golden
    bundles = []
    for k in range(len(arrays["emb"])):
        layers = {}
        for module in encoder.modules_read:
            down = arrays[f"lora{k}.{module.name}.lora_A.weight"]
            up = arrays[f"lora{k}.{module.name}.lora_B.weight"]
            for part, rows in zip(module.parts, up.split(module.sizes), strict=True):
                layers[part] = Factors(down, rows)
        bundles.append(LoraBundle("flux", layers))
    return collate(bundles, encoder.modules_read, torch.float64)


def test_the_order_of_the_layers(golden, encoder):
    _, meta = golden
    assert [module.name for module in encoder.modules_read] == meta["order"]
    assert [module.type for module in encoder.modules_read] == meta["types"]
    assert {index_of(module.parts[0]) for module in encoder.modules_read} == {0, 1}


def test_tokens_embeddings_loss_and_gradients(golden, encoder, batch):
    arrays, _ = golden
    tokens, present = encoder.tokens(batch)
    assert present.all()
    torch.testing.assert_close(tokens[-1:], arrays["tokens0"], **TOLERANCE)
    embeddings = encoder(batch)
    torch.testing.assert_close(embeddings, arrays["emb"], **TOLERANCE)
    similarity = F.normalize(arrays["text"]) @ F.normalize(embeddings).mT
    torch.testing.assert_close(similarity, arrays["sim"], **TOLERANCE)
    loss = PublishedLoss()(arrays["text"], embeddings)
    torch.testing.assert_close(loss, arrays["loss"], **TOLERANCE)
    encoder.zero_grad()
    loss.backward()
    named = dict(encoder.named_parameters())
    wanted = {key[2:]: value for key, value in arrays.items() if key.startswith("g.")}
    assert len(wanted) == len(encoder.modules_read) + 3
    for name, gradient in wanted.items():
        torch.testing.assert_close(
            named[name].grad, gradient.double(), rtol=1e-6, atol=1e-6 * gradient.abs().max().item()
        )


def test_without_the_causal_mask_the_vectors_are_others(golden, encoder, batch, monkeypatch):
    monkeypatch.setattr(encoder, "_visible", lambda present: None)
    error = (encoder(batch) - golden[0]["emb"]).abs().max()
    assert error > 1e-3
