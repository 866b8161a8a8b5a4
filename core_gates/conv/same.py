"""Convolution that keeps the grid: odd kernels, zero padding, optionally periodic in longitude."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
    total = taps[center] if bias is None else taps[center] + bias
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
