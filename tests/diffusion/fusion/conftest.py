"""A small transformer with the names of FLUX.1, adapters of it, and their files."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.diffusion.random_adapters import random_adapter

D = 8


def linears(sizes):
    return {name: nn.Linear(*size) for name, size in sizes.items()}


class Attention(nn.Module):
    """Four layers of one input, or eight of two."""

    def __init__(self, text):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(D, D) for _ in range(3))
        if text:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(D, D) for _ in range(3))
            self.to_out = nn.ModuleList([nn.Linear(D, D)])
            self.to_add_out = nn.Linear(D, D)


class Norm(nn.Module):
    def __init__(self, chunks):
        super().__init__()
        self.linear = nn.Linear(D, chunks * D)


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        inner = nn.Module()
        inner.proj = nn.Linear(D, 4 * D)
        self.net = nn.ModuleList([inner, nn.Identity(), nn.Linear(4 * D, D)])

    def forward(self, x):
        return self.net[2](F.gelu(self.net[0].proj(x)))


class Double(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm1_context = Norm(6), Norm(6)
        self.attn = Attention(text=True)
        self.ff, self.ff_context = FeedForward(), FeedForward()

    def forward(self, x, y, t):
        x = x + self.norm1.linear(t).chunk(6, -1)[0]
        y = y + self.norm1_context.linear(t).chunk(6, -1)[0]
        a = self.attn
        both = [torch.cat(two, 1) for two in (
            (a.add_q_proj(y), a.to_q(x)), (a.add_k_proj(y), a.to_k(x)), (a.add_v_proj(y), a.to_v(x))
        )]  # fmt: skip
        mixed = F.scaled_dot_product_attention(*both)
        y, x = y + a.to_add_out(mixed[:, : y.shape[1]]), x + a.to_out[0](mixed[:, y.shape[1] :])
        return x + self.ff(x), y + self.ff_context(y)


class Single(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attn = Norm(3), Attention(text=False)
        self.proj_mlp, self.proj_out = nn.Linear(D, 4 * D), nn.Linear(5 * D, D)

    def forward(self, x, t):
        x = x + self.norm.linear(t).chunk(3, -1)[0]
        mlp, a = F.gelu(self.proj_mlp(x)), self.attn
        mixed = F.scaled_dot_product_attention(a.to_q(x), a.to_k(x), a.to_v(x))
        return x + self.proj_out(torch.cat([mixed, mlp], -1))


class FluxTransformer2DModel(nn.Module):
    """Two streams, then one; named as in diffusers."""

    def __init__(self):
        super().__init__()
        self.x_embedder, self.context_embedder = nn.Linear(4, D), nn.Linear(6, D)
        self.transformer_blocks = nn.ModuleList([Double()])
        self.single_transformer_blocks = nn.ModuleList([Single()])
        self.proj_out = nn.Linear(D, 4)

    def forward(self, hidden_states, encoder_hidden_states, timestep):
        t = torch.stack([(timestep * 3**k).cos() for k in range(D)], -1).unsqueeze(1)
        t = t.to(hidden_states.dtype)
        x, y = self.x_embedder(hidden_states), self.context_embedder(encoder_hidden_states)
        for block in self.transformer_blocks:
            x, y = block(x, y, t)
        x = torch.cat([y, x], 1)
        for block in self.single_transformer_blocks:
            x = block(x, t)
        return (self.proj_out(x[:, y.shape[1] :]),)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return FluxTransformer2DModel().double().eval().requires_grad_(False)


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    sizes = ((2, 5, 4), (2, 3, 6))
    x, y = (torch.randn(*size, dtype=torch.float64) for size in sizes)
    return {"hidden_states": x, "encoder_hidden_states": y, "timestep": torch.tensor([0.2, 0.9])}


@pytest.fixture
def bundle(model):
    """``bundle(seed, rank=2, where="", family="flux")``: an adapter of some layers."""
    return partial(random_adapter, model, where="", size=0.45, scale=0.5, dtype=torch.float64)
