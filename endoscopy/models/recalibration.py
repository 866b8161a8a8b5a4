"""Channel attention as a baseline: it depends on the image and sits where static gates do.

Squeeze-and-excitation (Hu et al., 2018, reduction 16), ECA (Wang et al., 2020) and CBAM (Woo et
al., 2018), as timm builds them.
"""

from typing import Any, Literal, get_args

from torch import Tensor, nn

from core_gates.surgery import gate_hosts

Recalibrator = Literal["se", "eca", "cbam"]
REDUCTION = 1 / 16


class Recalibration(nn.Module):
    """Channel attention of images or of tokens, which are read as a column of pixels.

    Args:
        kind: ``se``, ``eca`` or ``cbam``.
        dim: Number of features.
        feature_dim: Dimension of the features: -1 for tokens (B, N, D), 1 for images (B, C, H, W).

    Raises:
        ValueError: The kind is unknown, or CBAM, which convolves over the image, is to see tokens.
    """

    def __init__(self, kind: Recalibrator, dim: int, feature_dim: int) -> None:
        super().__init__()
        if kind not in get_args(Recalibrator):
            raise ValueError(f"kind is {kind!r}; choose one of {', '.join(get_args(Recalibrator))}")
        if kind == "cbam" and feature_dim != 1:
            raise ValueError("cbam convolves over images, found tokens; choose se, eca or a CNN")
        options = {} if kind == "eca" else {"rd_ratio": REDUCTION}
        from timm.layers import create_attn  # see endoscopy.models.trunks

        self.attention = create_attn(kind, dim, **options)
        self.feature_dim = feature_dim

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` (B, C, H, W), (B, H, W, C) or (B, N, D) with its features rescaled."""
        if self.feature_dim == 1:
            y: Tensor = self.attention(x)
            return y
        column = x.flatten(1, -2).mT.unsqueeze(-1)
        return self.attention(column).squeeze(-1).mT.reshape(x.shape)


def recalibrate(model: nn.Module, kind: Recalibrator) -> dict[str, Recalibration]:
    """Put channel attention where :func:`core_gates.inject_gates` puts gates, in place.

    Args:
        model: A ViT, Swin, ConvNeXt or ResNet as timm builds it.
        kind: ``se``, ``eca`` or ``cbam``.

    Returns:
        Name of each module -> the attention that follows it.
    """
    placed = {}
    for name, host in gate_hosts(model).items():
        placed[name] = Recalibration(kind, host.dim, host.feature_dim)
        host.module.add_module("attention", placed[name])  # the last step of a stage
        if not isinstance(host.module, nn.Sequential):
            host.module.register_forward_hook(_attend)
    return placed


def _attend(module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    attention = module.attention
    assert isinstance(attention, Recalibration)
    result: Tensor = attention(output)
    return result
