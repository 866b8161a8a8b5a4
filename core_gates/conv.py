"""Gated convolution of several streams, and convolution that keeps the size on the globe."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core_gates.ops.elementwise import silu_gate

__all__ = ["GatedConv", "PartialConv", "SameConv", "same_conv"]


def same_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, circular: bool = False
) -> Tensor:
    """Convolve with stride 1 and the padding that keeps every extent.

    A volume of few levels is convolved in two dimensions with its levels folded into the channels,
    wherever the kernel reaches from any level to any other: the same sum without multiplying by
    padding. Deeper volumes are convolved level by level on CPU, up to four times faster than the
    3-D convolution; elsewhere they are made contiguous for it, because its backward pass is slow
    for channels-last strides.

    Args:
        x: ``(B, I, D, H, W)`` or ``(B, I, H, W)``, any strides.
        weight: ``(O, I, *kernel)``, odd extents.
        bias: ``(O,)`` or None.
        circular: Pad the last dimension with its other end instead of zeros.

    Returns:
        ``(B, O, D, H, W)`` or ``(B, O, H, W)``.

    Raises:
        ValueError: ``circular`` and the kernel reaches around the whole circle.
    """
    padding = [extent // 2 for extent in weight.shape[2:]]
    if circular and padding[-1]:
        x = _wrap(x, padding[-1])
        padding[-1] = 0
    if x.ndim == 4:
        return F.conv2d(x, weight, bias, padding=padding)
    if x.shape[2] <= padding[0] + 1:
        return _folded_conv(x, weight, bias, padding[1:])
    if x.device.type == "cpu":
        return _levelwise_conv(x, weight, bias, padding[1:])
    return F.conv3d(x.contiguous(), weight, bias, padding=padding)


def _wrap(x: Tensor, margin: int) -> Tensor:
    if margin > x.shape[-1]:
        raise ValueError(
            f"a kernel of width {2 * margin + 1} reaches around a circle of {x.shape[-1]} columns: "
            "use a narrower kernel"
        )
    rows = x.movedim(1, -1)  # (B, ..., W, C): keeps channels-last strides through the copy
    rows = torch.cat((rows[..., -margin:, :], rows, rows[..., :margin, :]), dim=-2)
    return rows.movedim(-1, 1)


def _folded_conv(x: Tensor, weight: Tensor, bias: Tensor | None, padding: list[int]) -> Tensor:
    num_batch, _, num_levels, height, width = x.shape
    num_out, center = weight.shape[0], weight.shape[2] // 2
    x = x.permute(0, 3, 4, 2, 1).reshape(num_batch, height, width, -1).permute(0, 3, 1, 2)
    if num_levels == 1:
        weight = weight[:, :, center]
    else:  # output level d sees input level e through tap center + e - d
        taps = [weight[:, :, center - d : center - d + num_levels] for d in range(num_levels)]
        weight = torch.stack(taps).transpose(2, 3).flatten(2, 3).flatten(0, 1)
        bias = None if bias is None else bias.repeat(num_levels)
    y = F.conv2d(x, weight, bias, padding=padding)
    return y.view(num_batch, num_levels, num_out, height, y.shape[-1]).transpose(1, 2)


def _levelwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None, padding: list[int]) -> Tensor:
    num_batch, _, num_levels, height, width = x.shape
    num_out, _, num_taps = weight.shape[:3]
    x = x.permute(0, 2, 3, 4, 1).reshape(-1, height, width, x.shape[1]).permute(0, 3, 1, 2)
    y = F.conv2d(x, weight.permute(2, 0, 1, 3, 4).flatten(0, 1), padding=padding)
    y = y.permute(0, 2, 3, 1).reshape(num_batch, num_levels, height, -1, num_taps, num_out)
    center = num_taps // 2
    taps = y.unbind(4)
    total = taps[center] if bias is None else taps[center] + bias.to(y.dtype)
    for tap, part in enumerate(taps):  # tap t of level e belongs to level e + center - t
        up, down = max(tap - center, 0), max(center - tap, 0)
        if up or down:
            total = total + F.pad(part[:, up : num_levels - down], (0,) * 6 + (down, up))
    return total.movedim(-1, 1)


class SameConv(nn.Module):
    """Convolution over ``(B, C, D, H, W)`` or ``(B, C, H, W)`` that keeps the grid.

    Initialized as the convolutions of PyTorch.

    Args:
        in_dim: Channels of the input.
        dim: Channels of the output.
        kernel_size: Extents of the kernel, all odd; an integer stands for all of them.
        ndim: 2 or 3 spatial dimensions.
        circular: Pad the last dimension (longitude) periodically; the others with zeros.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Raises:
        ValueError: The kernel has an even extent or another number of dimensions.
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
        if ndim not in (2, 3):
            raise ValueError(f"ndim must be 2 or 3, found {ndim}")
        kernel = (kernel_size,) * ndim if isinstance(kernel_size, int) else tuple(kernel_size)
        if len(kernel) != ndim or any(extent < 1 or extent % 2 == 0 for extent in kernel):
            raise ValueError(f"the kernel needs {ndim} odd extents, found {kernel}")
        super().__init__()
        self.ndim = ndim
        self.circular = circular
        self.weight = nn.Parameter(torch.empty(dim, in_dim, *kernel, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights uniformly within one over the root of the fan-in."""
        bound = 1 / math.sqrt(self.weight[0].numel())
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of ``x``; see `same_conv`."""
        if x.ndim != self.ndim + 2 or x.shape[1] != self.weight.shape[1]:
            raise ValueError(
                f"expected (B, {self.weight.shape[1]}) and {self.ndim} spatial dimensions, "
                f"found {tuple(x.shape)}"
            )
        return same_conv(x, self.weight, self.bias, circular=self.circular)

    def extra_repr(self) -> str:
        """Show the shape of the weight and the padding."""
        return f"weight={tuple(self.weight.shape)}, circular={self.circular}"


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
