"""A tiny FLUX.1 of diffusers, adapters of it, and the change they make when computed in full."""

from copy import deepcopy
from functools import partial

import pytest
import torch

from tests.diffusion.random_adapters import random_adapter

IMAGES, TEXTS = 5, 3


@pytest.fixture(scope="session")
def _flux():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    made = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=10,
        guidance_embeds=False, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return made.double().eval().requires_grad_(False)


@pytest.fixture(scope="session")
def untouched(_flux):
    """A copy that never gets adapters."""
    return deepcopy(_flux)


@pytest.fixture
def flux(_flux):
    """The model; its state has to be the same after a test."""
    layers = dict(_flux.named_modules())
    before = {name: tensor.clone() for name, tensor in _flux.state_dict().items()}
    yield _flux
    assert list(dict(_flux.named_modules()).values()) == list(layers.values())
    assert all(m is layers[name] for name, m in _flux.named_modules())
    after = _flux.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in _flux.modules())
    assert not any(p.requires_grad or p.grad is not None for p in _flux.parameters())
    assert not any(m.training for m in _flux.modules())


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    x, y = (torch.randn(2, n, d, dtype=torch.float64) for n, d in ((IMAGES, 8), (TEXTS, 12)))
    return {
        "hidden_states": x, "encoder_hidden_states": y,
        "pooled_projections": torch.randn(2, 10, dtype=torch.float64),
        "timestep": torch.tensor([0.2, 0.9], dtype=torch.float64),
        "img_ids": torch.arange(IMAGES * 3).view(-1, 3) % 4, "txt_ids": torch.zeros(TEXTS, 3),
        "return_dict": False,
    }  # fmt: skip


@pytest.fixture
def bundle(untouched):
    """``bundle(seed, rank=2, where="", scale=0.5)``: an adapter of some layers."""
    options = {"where": "", "size": 0.45, "scale": 0.5, "dtype": torch.float64}
    return partial(random_adapter, untouched, **options)


@pytest.fixture
def adapters(bundle):
    """Three; the second lacks many layers and has another rank, the third lacks others."""
    return {"a": bundle(1), "b": bundle(2, rank=3, where="attn"), "c": bundle(3, where="blocks")}


@pytest.fixture
def dense(untouched, inputs):
    """``dense(adapters, weights)``: what the model predicts with ΔW added to its weights."""

    def predict(adapters, weights=None, given=None):
        made = deepcopy(untouched)
        for name, adapter in adapters.items():
            for module in adapter.modules:
                weight = 1.0 if weights is None else weights.get(name, 0.0)
                made.get_submodule(module).weight += weight * adapter.delta_weight(module)
        return made(**(given or inputs))[0]

    return predict
