"""The network of one stream, from an image to a vector of features; a small ResNet among them."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

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
