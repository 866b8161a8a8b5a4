"""Convolutions that know where there are observations: gated and partial."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core_gates.conv.same import SameConv, same_conv
from core_gates.ops.silu_gate.op import silu_gate

Streams = tuple[Tensor, Tensor, Tensor]
"""Background, observation and gate features, all of one shape."""


class GatedConv(nn.Module):
    """Gated convolution of background, observation and gate streams (arXiv 2312.12462).

    ``x1 = silu(K_x x)``, ``g1 = sigmoid(K_g g)``, ``o1 = silu(K_o o) * g1``: where the gate stream
    signals nothing worth hearing, the observation stream is silenced.

    Args:
        in_dim: Channels of each input stream.
        dim: Channels of each output stream.
        kernel_size: Odd extents of the kernel, one integer for all or ``ndim`` of them.
        ndim: 2 or 3 spatial dimensions.
        circular: Pad the last dimension (longitude) periodically; the others with zeros.
        gated: False gives the control with the same parameters that adds instead of multiplying,
            ``o1 = silu(K_o o + K_g g)``.
        open_gate: True gives the control whose gates are all one, ``o1 = silu(K_o o)``; the gate
            stream is not read.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Shape:
        Three streams (B, I, [D,] H, W) to three streams (B, C, [D,] H, W).
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        kernel_size: int | tuple[int, ...],
        *,
        ndim: int = 3,
        circular: bool = False,
        gated: bool = True,
        open_gate: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.gated, self.open_gate = gated, open_gate

        def conv() -> SameConv:
            return SameConv(
                in_dim, dim, kernel_size, ndim=ndim, circular=circular, device=device, dtype=dtype
            )

        self.conv_x, self.conv_o, self.conv_g = conv(), conv(), conv()

    def forward(self, x: Tensor, o: Tensor, g: Tensor) -> Streams:
        """Return the next background, observation and gate features.

        Raises:
            ValueError: The streams differ in shape.
        """
        if not x.shape == o.shape == g.shape:
            raise ValueError(
                "the three streams must have one shape, found "
                f"{tuple(x.shape)}, {tuple(o.shape)} and {tuple(g.shape)}"
            )
        signal = self.conv_o(o)
        if self.open_gate:
            return F.silu(self.conv_x(x)), F.silu(signal), torch.ones_like(signal)
        logits = self.conv_g(g)
        if self.gated:
            o1, g1 = silu_gate(signal, logits)
        else:
            o1, g1 = F.silu(signal + logits), logits.sigmoid()
        return F.silu(self.conv_x(x)), o1, g1

    def gate_values(self, x: Tensor, o: Tensor, g: Tensor) -> Tensor:  # noqa: ARG002
        """Return the gates ``sigmoid(K_g g)`` (B, C, [D,] H, W) that the observations meet."""
        values: Tensor = self.conv_g(g).sigmoid()
        return torch.ones_like(values) if self.open_gate else values


class PartialConv(nn.Module):
    """Partial convolution, the rule-based rival of a learned gate (Liu et al., 2018).

    ``o1 = W (o * m) * k / sum(m) + b`` over the window of each cell, k its number of entries, and
    ``m1 = 1[sum(m) > 0]``; cells without any entry become zero. What lies under the mask is ignored
    whatever it holds, NaN too.

    Args:
        in_dim: Channels of the input.
        dim: Channels of the output.
        kernel_size: Odd extents of the kernel, one integer for all or ``ndim`` of them.
        ndim: 2 or 3 spatial dimensions.
        circular: Pad the last dimension (longitude) periodically; the others with zeros.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Shape:
        ``o`` (B, I, [D,] H, W); ``mask`` (B, I or 1, [D,] H, W) of zeros and ones; outputs
        (B, C, [D,] H, W) and (B, 1, [D,] H, W).
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        kernel_size: int | tuple[int, ...],
        *,
        ndim: int = 3,
        circular: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.conv = SameConv(
            in_dim, dim, kernel_size, ndim=ndim, circular=circular, device=device, dtype=dtype
        )

    def forward(self, o: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the convolved observations and the mask of the cells that saw at least one."""
        weight, bias, circular = self.conv.weight, self.conv.bias, self.conv.circular
        mask = mask.to(o.dtype)
        window = torch.ones_like(weight[:1, : mask.shape[1]])
        total = same_conv(mask, window, circular=circular)
        seen = (total > 0.5).to(o.dtype)
        visible = torch.where(mask != 0, o, 0)  # multiplying would keep what is not finite
        signal = same_conv(visible, weight, circular=circular)
        scale = window.numel() / total.clamp_min(1)
        return (signal * scale + bias.view(-1, *(1,) * self.conv.ndim)) * seen, seen
