"""Layers of the transformer over the tokens of an adapter: those of the text tower of CLIP."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def quick_gelu(x: Tensor) -> Tensor:
    """Return ``x * sigmoid(1.702 x)``, which CLIP approximates GELU by."""
    return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Multi-head self-attention with biases.

    Args:
        dim: Features of a token.
        heads: Number of heads.
        head_dim: Features of a head.
    """

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, heads * head_dim)
        self.to_k = nn.Linear(dim, heads * head_dim)
        self.to_v = nn.Linear(dim, heads * head_dim)
        self.to_out = nn.Linear(heads * head_dim, dim)

    def forward(self, x: Tensor, visible: Tensor | None) -> Tensor:
        """Return what each token attends to.

        Args:
            x: Tokens (n, S, dim).
            visible: Whether a query may see a key, broadcast to (n, heads, S, S); None for all.
        """
        q, k, v = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear in (self.to_q, self.to_k, self.to_v)
        )
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        out: Tensor = self.to_out(seen.transpose(1, 2).flatten(2))
        return out


class EncoderLayer(nn.Module):
    """Attention and a feed-forward network, each after a LayerNorm and added to its input.

    Args:
        dim: Features of a token.
        heads: Attention heads.
        head_dim: Features of a head.
        hidden_dim: Features of the hidden layer.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads, head_dim)
        self.layer_norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        """Return the tokens (n, S, dim) after the layer."""
        x = x + self.attn(self.layer_norm1(x), visible)
        out: Tensor = x + self.fc2(quick_gelu(self.fc1(self.layer_norm2(x))))
        return out
