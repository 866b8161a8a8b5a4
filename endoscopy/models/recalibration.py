"""Channel attention as a baseline: it depends on the image and takes the place of static gates."""

from typing import Any

from torch import Tensor, nn

from core_gates.surgery import gate_hosts

REDUCTION = 1 / 16


class Recalibration(nn.Module):
    """Squeeze-and-excitation (Hu et al., 2018, reduction 16), as timm builds it.

    Tokens are read as a column of pixels.

    Args:
        dim: Number of features.
        feature_dim: Dimension of the features: -1 for tokens (B, N, D), 1 for images (B, C, H, W).
    """

    def __init__(self, dim: int, feature_dim: int) -> None:
        super().__init__()
        from timm.layers import create_attn  # see endoscopy.models.trunks

        self.attention = create_attn("se", dim, rd_ratio=REDUCTION)
        self.feature_dim = feature_dim

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` (B, C, H, W), (B, H, W, C) or (B, N, D) with its features rescaled."""
        if self.feature_dim == 1:
            y: Tensor = self.attention(x)
            return y
        column = x.flatten(1, -2).mT.unsqueeze(-1)
        return self.attention(column).squeeze(-1).mT.reshape(x.shape)


def recalibrate(model: nn.Module) -> dict[str, Recalibration]:
    """Put channel attention where :func:`core_gates.inject_gates` puts gates, in place.

    Args:
        model: A ViT, Swin, ConvNeXt or ResNet as timm builds it.

    Returns:
        Name of each module -> the attention that follows it.
    """
    placed = {}
    for name, host in gate_hosts(model).items():
        placed[name] = Recalibration(host.dim, host.feature_dim)
        host.module.add_module("attention", placed[name])  # the last step of a stage
        if not isinstance(host.module, nn.Sequential):
            host.module.register_forward_hook(_attend)
    return placed


def _attend(module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    attention = module.attention
    assert isinstance(attention, Recalibration)
    result: Tensor = attention(output)
    return result
