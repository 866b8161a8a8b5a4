"""The encoder and the loss of the published code, at vectors that it computed."""

from pathlib import Path

import pytest

from diffusion.evaluation.parity import encoder_errors, published_encoder
from diffusion.lora_file.family import index_of

VECTORS = Path(__file__).parents[2] / "golden/autolora"


@pytest.fixture(scope="module")
def published():
    return published_encoder(VECTORS)


def test_the_order_of_the_layers(published):
    (_, meta), encoder, _ = published
    modules = encoder.modules_read
    assert [module.name for module in modules] == meta["order"]
    assert [module.type for module in modules] == meta["types"]
    assert {index_of(module.parts[0]) for module in modules} == {0, 1}


def test_tokens_embeddings_loss_and_gradients(published):
    (_, meta), encoder, batch = published
    assert encoder.tokens(batch)[1].all()
    errors = dict(encoder_errors(VECTORS))
    assert sum(name.startswith("g.") for name in errors) == len(meta["order"]) + 3
    assert {"tokens0", "emb", "sim", "loss"} < errors.keys()
    assert {name: error for name, error in errors.items() if not error <= 1e-6} == {}


def test_without_the_causal_mask_the_vectors_are_others(published, monkeypatch):
    (arrays, _), encoder, batch = published
    monkeypatch.setattr(encoder, "_visible", lambda present: None)
    assert (encoder(batch) - arrays["emb"]).abs().max() > 1e-3
