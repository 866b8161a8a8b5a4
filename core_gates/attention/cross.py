"""Cross-attention between a background and observations, gated by confidence."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from core_gates.attention.window import Extents, SwinBlock, WindowLayout


class GatedCrossAttention(nn.Module):
    """Let a background and an observation stream attend to each other (arXiv 2312.12462).

    With ``CB(q, k)`` a `SwinBlock` and windows that are shifted in the second half::

        x_m = x * (1 - g) + CB(x * g, o)        o_m = CB(o, x)
        x_2 = x_m * (1 - g) + CB(x_m * g, o_m)  o_2 = CB(o_m, x_m)
        g_2 = sigmoid(K g)                      K is 1 x 1 x 1

    Since ``x * (1 - g) + x * g = x``, the module adds ``CB(x * g, o) - x * g`` to ``x``. A closed
    gate leaves a query that knows nothing of the background; it does not leave ``x`` untouched.

    Depth and latitude are masked across the shift, longitude is periodic.

    Args:
        dim: Channels of each stream.
        num_heads: Number of heads.
        window: Extents of a window in depth, latitude and longitude.
        mlp_ratio: Hidden channels of the MLPs over ``dim``.
        drop_path: Rate at which a residual branch is dropped.
        legacy_clip: See `core_gates.attention.WindowAttention`.
        gated: False gives the control with the same parameters, ``x * g -> x`` and ``1 - g -> 0``.
        recompute: Recompute branches in the backward pass instead of storing them.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Shape:
        Three streams (B, C, D, H, W) to three streams of the same shape.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: Extents,
        *,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        legacy_clip: bool = False,
        gated: bool = True,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.window: Extents = (window[0], window[1], window[2])
        self.gated = gated

        def block() -> SwinBlock:
            return SwinBlock(
                dim,
                num_heads,
                self.window,
                mlp_ratio=mlp_ratio,
                drop_path=drop_path,
                legacy_clip=legacy_clip,
                recompute=recompute,
                device=device,
                dtype=dtype,
            )

        self.background1, self.observation1 = block(), block()
        self.background2, self.observation2 = block(), block()
        self.gate = nn.Linear(dim, dim, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Reset the four blocks and the gate."""
        for block in (self.background1, self.observation1, self.background2, self.observation2):
            block.reset_parameters()
        self.gate.reset_parameters()

    def forward(self, x: Tensor, o: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the next background, observation and gate features.

        Raises:
            ValueError: The streams differ in shape, or are not (B, C, D, H, W).
        """
        if not (x.shape == o.shape == g.shape and x.ndim == 5):
            raise ValueError(
                "the three streams must have one shape (B, C, D, H, W), found "
                f"{tuple(x.shape)}, {tuple(o.shape)} and {tuple(g.shape)}"
            )
        size: Extents = (x.shape[2], x.shape[3], x.shape[4])
        plain = WindowLayout.of(size, self.window)
        shifted = WindowLayout.of(size, self.window, shifted=True)
        x, o, gates = (plain.partition(stream) for stream in (x, o, g))
        g2 = plain.reverse(self.gate(gates).sigmoid())
        x, o = self._exchange(self.background1, self.observation1, x, o, gates, plain)
        if shifted != plain:
            x, o = (shifted.partition(plain.reverse(stream)) for stream in (x, o))
            gates = shifted.partition(g)
        x, o = self._exchange(self.background2, self.observation2, x, o, gates, shifted)
        return shifted.reverse(x), shifted.reverse(o), g2

    def gate_values(self, x: Tensor, o: Tensor, g: Tensor) -> Tensor:  # noqa: ARG002
        """Return the gate stream ``sigmoid(K g)`` (B, C, D, H, W) that this module passes on."""
        values: Tensor = self.gate(g.movedim(1, -1)).sigmoid()
        return values.movedim(-1, 1)

    def _exchange(
        self,
        background: SwinBlock,
        observation: SwinBlock,
        x: Tensor,
        o: Tensor,
        gates: Tensor,
        layout: WindowLayout,
    ) -> tuple[Tensor, Tensor]:
        query = x * gates if self.gated else x
        return x + background.update(query, o, layout), o + observation.update(o, x, layout)
