"""The network of one stream, and the gates that a sizing network can have."""

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from core_gates import FeatureSelectionGate, inject_gates
from core_gates.errors import check_option
from core_gates.surgery import gate_hosts


class LayerScale(FeatureSelectionGate):
    """Scale every feature by a learned factor of any sign (Touvron et al., 2021, equation 3).

    ``y = g * x``: a feature-selection gate without its sigmoid, an ordinary weight otherwise, so
    that it belongs to the main optimizer. It folds like a gate.

    Args:
        dim: Number of features.
        init: Factor of all features at the start; 1e-5 in a deep residual branch, 1 elsewhere.
        feature_dim: Dimension of the features: -1 for tokens, 1 for images (B, C, H, W).
        device: Device of the factors.
        dtype: Floating dtype of the factors.

    Shape:
        ``x`` and the result (..., dim, ...).
    """

    def __init__(
        self,
        dim: int,
        *,
        init: float = 1e-5,
        feature_dim: int = -1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, init=init, feature_dim=feature_dim, device=device, dtype=dtype)

    def scores(self) -> Tensor:
        """Return the factors (dim,), zero where pruned."""
        return torch.where(self.kept, self._exact_logits(), 0)

    @torch.no_grad()
    def prune_(self, threshold: float = 0.0) -> int:
        """Close for good the factors of at most this size; return how many remain."""
        self.kept &= self.scores().abs() > threshold
        return int(self.kept.sum())


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

        self.attention = create_attn("se", dim, rd_ratio=1 / 16)
        self.feature_dim = feature_dim

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` (B, C, H, W), (B, H, W, C) or (B, N, D) with its features rescaled."""
        if self.feature_dim == 1:
            return self.attention(x)
        column = x.flatten(1, -2).mT.unsqueeze(-1)
        return self.attention(column).squeeze(-1).mT.reshape(x.shape)


def recalibrate(model: nn.Module) -> dict[str, Recalibration]:
    """Put channel attention where `core_gates.inject_gates` puts gates, in place.

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


def _attend(module: Any, _inputs: Any, output: Tensor) -> Tensor:
    return module.attention(output)


GateKind = Literal["fsg", "none", "layer_scale", "se", "l0"]
STATIC = ("fsg", "l0", "layer_scale")  # kinds that do not depend on the image
GateMaker = Callable[..., FeatureSelectionGate]

L0_START = 2.2
"""Logit of L0 gates at the start: open with probability 0.98, a score of 0.98."""


def gate_trunk(trunk: nn.Module, kind: GateKind) -> int:
    """Gate the residual branches or stages of a trunk, in place.

    Args:
        trunk: A ViT, Swin, ConvNeXt or ResNet; another network stays as it is.
        kind: ``fsg``, feature-selection gates (arXiv 2407.04400); ``l0``, the same with hard
            concrete scores (Louizos et al., 2018); ``layer_scale``; ``se``, squeeze-and-excitation;
            or ``none``.

    Returns:
        Number of gates.

    Raises:
        ValueError: The kind is unknown or does not fit the trunk.
    """
    check_option("gates", kind, get_args(GateKind))
    hosts = gate_hosts(trunk)
    if kind == "none" or not hosts:
        return 0
    if kind == "se":
        return len(recalibrate(trunk))
    if kind == "layer_scale":
        stages = any(isinstance(host.module, nn.Sequential) for host in hosts.values())
        make: GateMaker = partial(LayerScale, init=1.0 if stages else 1e-5)
    else:
        make = static_gate(kind)
    return len(inject_gates(trunk, gate=make))


def static_gate(kind: GateKind) -> GateMaker:
    """Return the constructor of a static gate, which takes the number of features."""
    if kind == "layer_scale":
        return partial(LayerScale, init=1.0)
    if kind == "l0":
        return partial(FeatureSelectionGate, rectifier="hard_concrete", init=L0_START)
    return FeatureSelectionGate


def head_gate(kind: GateKind, dim: int) -> nn.Module:
    """Return a gate on ``dim`` pooled features; none for kinds that pool an image themselves."""
    return static_gate(kind)(dim) if kind in STATIC else nn.Identity()


def gates_of(model: nn.Module) -> dict[str, FeatureSelectionGate]:
    """Return the gates that a gate optimizer may move, by name; LayerScale is a weight."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, FeatureSelectionGate) and not isinstance(module, LayerScale)
    }


def gate_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of the gate optimizer by name; all others are weights."""
    return {f"{name}.logits": gate.logits for name, gate in gates_of(model).items()}


def weight_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of the main optimizer by name: all but those of gates."""
    gates = gate_parameters(model)
    return {name: p for name, p in model.named_parameters() if name not in gates}


TINY_RESNET = "tiny_resnet"


class TinyResNet(nn.Module):
    """A stem and four stages of basic blocks, without pooling before the end.

    Args:
        in_channels: Channels of an image.
        widths: Channels of the stem and of each stage; every stage after the first halves the map.
        depths: Blocks of each stage.

    Shape:
        Images (B, in_channels, H, W) to features (B, widths[-1]).

    Raises:
        ValueError: The number of widths is not one more than that of depths.
    """

    def __init__(
        self,
        in_channels: int = 3,
        widths: Sequence[int] = (16, 16, 32, 64, 96),
        depths: Sequence[int] = (1, 1, 1, 1),
    ) -> None:
        super().__init__()
        if len(widths) != len(depths) + 1:
            raise ValueError(
                f"widths has {len(widths)} entries and depths {len(depths)}: expected one of widths"
                " more, for the stem"
            )
        self.num_features, self.num_stages = widths[-1], len(depths)
        self.conv1 = nn.Conv2d(in_channels, widths[0], 5, stride=2, padding=2, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        for k, depth in enumerate(depths, 1):
            self.add_module(f"layer{k}", _stage(widths[k - 1], widths[k], depth, 1 + (k > 1)))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return the pooled features of the last stage."""
        x = x.contiguous(memory_format=torch.channels_last)  # a quarter faster on a CPU
        x = torch.relu(self.bn1(self.conv1(x)))
        for k in range(1, self.num_stages + 1):
            x = self.get_submodule(f"layer{k}")(x)
        return x.mean((2, 3))


def _stage(in_dim: int, dim: int, depth: int, stride: int) -> nn.Sequential:
    shortcut = None
    if stride > 1 or in_dim != dim:
        conv = nn.Conv2d(in_dim, dim, 1, stride, bias=False)
        conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as its gradient
        shortcut = nn.Sequential(conv, nn.BatchNorm2d(dim))
    blocks = [BasicBlock(in_dim, dim, stride, shortcut)]
    blocks += [BasicBlock(dim, dim) for _ in range(depth - 1)]
    return nn.Sequential(*blocks)


def build_trunk(name: str, in_channels: int, options: Mapping[str, Any]) -> tuple[nn.Module, int]:
    """Build an untrained trunk without a classifier.

    Args:
        name: ``tiny_resnet`` or any model of timm.
        in_channels: Channels of its images.
        options: Other arguments of its constructor, such as ``img_size`` or ``drop_path_rate``.

    Returns:
        Network of images (B, in_channels, H, W) to features (B, D), and D.

    Raises:
        ValueError: timm has no such model, or the model no such option.
    """
    try:
        if name == TINY_RESNET:
            tiny = TinyResNet(in_channels, **options)
            return tiny, tiny.num_features
        import timm  # takes a second, which ``--help`` does not need

        if not timm.is_model(name):
            near = get_close_matches(name, [TINY_RESNET, *timm.list_models()], 1)
            hint = f"did you mean {near[0]!r}?" if near else "see timm.list_models()"
            raise ValueError(
                f"trunk {name!r} is neither {TINY_RESNET!r} nor a model of timm; {hint}"
            )
        trunk = timm.create_model(name, in_chans=in_channels, num_classes=0, **options)
    except TypeError as error:  # Python's message names the argument
        raise ValueError(f"trunk {name!r} refuses its options {dict(options)}: {error}") from error
    num_features = trunk.num_features
    assert isinstance(num_features, int)
    return trunk, num_features
