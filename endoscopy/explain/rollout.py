"""Attention roll-out of transformer sizing networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core_gates.errors import GatesError
from endoscopy.models.sizer import MultiStreamSizer


def attention_rollout(
    model: MultiStreamSizer,
    streams: Mapping[str, Tensor],
    geometry: Tensor | None = None,
    *,
    stream: str | None = None,
) -> Tensor:
    """Return to what extent each patch reaches the token that the head reads.

    The product over the blocks of ``(A + I) / 2``, A the attention averaged over heads (Abnar and
    Zuidema, 2020), read at the class token, or averaged over tokens where there is none. Shown is
    the excess of a patch over uniform attention, in units of the latter or of the largest excess,
    whichever is larger: uniform attention is 0.

    Args:
        model: A network of plain ViTs, for evaluation.
        streams: Normalized images (B, C, H, W) by name.
        geometry: Of the boxes (B, 4), if the network reads it.
        stream: Whose branch to look at; the first by default.

    Returns:
        (B, H, W) in [0, 1].

    Raises:
        GatesError: The branch is not a plain ViT, or does not exist.
    """
    name = stream or next(iter(model.branches))
    trunk = _vit(model, name)
    maps: list[Tensor] = []
    handles = [
        block.attn.register_forward_pre_hook(
            lambda attention, inputs: maps.append(attention_weights(attention, inputs[0]))
        )
        for block in trunk.blocks
    ]
    try:
        with torch.no_grad():
            model(streams, geometry)
    finally:
        for handle in handles:
            handle.remove()
    joined = torch.eye(maps[0].shape[-1], dtype=maps[0].dtype, device=maps[0].device)
    for weights in maps:
        joined = (0.5 * weights + 0.5 * torch.eye(weights.shape[-1]).to(weights)) @ joined
    prefix = int(trunk.num_prefix_tokens)
    read = joined[:, 0] if trunk.cls_token is not None else joined[:, prefix:].mean(1)
    grid = trunk.patch_embed.grid_size
    shares = read[:, prefix:] / read[:, prefix:].sum(1, keepdim=True)
    excess = (shares * shares.shape[1] - 1).clamp(min=0)
    excess = excess / excess.amax(1, keepdim=True).clamp(min=1)
    heat = excess.reshape(-1, 1, *grid)
    return F.interpolate(heat, streams[name].shape[2:], mode="bilinear")[:, 0]


def attention_weights(attention: Any, x: Tensor) -> Tensor:
    """Return the attention (B, N, N) of a timm attention on tokens (B, N, D), mean over heads."""
    batch, tokens, _ = x.shape
    qkv = attention.qkv(x).reshape(batch, tokens, 3, attention.num_heads, -1)
    query, key, _ = qkv.permute(2, 0, 3, 1, 4)
    logits = attention.q_norm(query) * attention.scale @ attention.k_norm(key).transpose(-2, -1)
    return logits.softmax(-1).mean(1)


def _vit(model: MultiStreamSizer, name: str) -> Any:
    if name not in model.branches:
        known = ", ".join(model.branches)
        raise GatesError(f"the network has no stream {name!r}; choose one of {known}")
    trunk = model.branches[name]
    blocks = getattr(trunk, "blocks", None)
    plain = isinstance(blocks, nn.Sequential) and all(
        hasattr(getattr(block, "attn", None), "qkv") for block in blocks
    )
    if not plain or not hasattr(trunk, "num_prefix_tokens"):
        raise GatesError(
            f"attention roll-out needs a plain ViT, which stream {name!r} is not; use Grad-CAM for "
            "a ResNet"
        )
    return trunk
