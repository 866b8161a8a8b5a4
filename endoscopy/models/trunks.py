"""The network of one stream: from an image to a vector of features."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from torch import nn

from endoscopy.models.tiny_resnet import TinyResNet

TINY_RESNET = "tiny_resnet"


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
