"""The published sizing networks, and small ones for a CPU."""

from typing import Any

from endoscopy.models.gate_kinds import GateKind
from endoscopy.models.sizer import MultiStreamSizer, Streams
from endoscopy.models.trunks import TINY_RESNET


def fsg_vit(
    name: str = "vit_tiny_patch16_384",
    streams: Streams = ("rgb",),
    outputs: int = 1,
    gates: GateKind = "fsg",
    geometry: bool = False,
    trunk_options: dict[str, Any] | None = None,
) -> MultiStreamSizer:
    """Return any vision transformer of timm with gates on its residual branches.

    Args:
        name: A ViT, DeiT, BEiT, EVA, Swin or ConvNeXt of timm.
        streams: See :class:`MultiStreamSizer`.
        outputs: Numbers that the network returns.
        gates: Kind of the gates.
        geometry: Whether the head also reads the box.
        trunk_options: Arguments of the timm model, e.g. ``img_size``, ``drop_path_rate`` or
            ``init_values``, the LayerScale in front of the gates.

    Raises:
        ValueError: timm has no such model, or there is no place for such gates.
    """
    return MultiStreamSizer(name, streams, outputs, gates, None, geometry, trunk_options)


def fsg_vit_tiny_patch16_384(
    streams: Streams = ("rgb",),
    outputs: int = 1,
    gates: GateKind = "fsg",
    geometry: bool = False,
    trunk_options: dict[str, Any] | None = None,
) -> MultiStreamSizer:
    """Return ViT-Ti/16 at 384 pixels, 24 gates of 192 features (arXiv 2407.04400).

    See :func:`fsg_vit` for the arguments.
    """
    return fsg_vit("vit_tiny_patch16_384", streams, outputs, gates, geometry, trunk_options)


def fsg_resnet18(
    streams: Streams = ("rgb",),
    outputs: int = 1,
    gates: GateKind = "fsg",
    hidden_dim: int = 128,
    geometry: bool = False,
    trunk_options: dict[str, Any] | None = None,
) -> MultiStreamSizer:
    """Return a ResNet-18 for each stream, gates after each stage and in the head.

    The published multi-stream network (arXiv 2407.04400); its streams are ``rgb``, ``loc`` and
    ``depth``, in this order. See :class:`MultiStreamSizer` for the arguments.
    """
    return MultiStreamSizer(
        "resnet18", streams, outputs, gates, hidden_dim, geometry, trunk_options
    )


def fsg_efficientnet_b0(
    streams: Streams = ("rgb",),
    outputs: int = 1,
    gates: GateKind = "fsg",
    hidden_dim: int = 128,
    geometry: bool = False,
    trunk_options: dict[str, Any] | None = None,
) -> MultiStreamSizer:
    """Return an EfficientNet-B0 for each stream, with gates L1 and L2 in the head alone.

    See :class:`MultiStreamSizer` for the arguments; ``se`` has no place.
    """
    return MultiStreamSizer(
        "efficientnet_b0", streams, outputs, gates, hidden_dim, geometry, trunk_options
    )


def tiny_resnet(
    streams: Streams = ("rgb_mask",),
    outputs: int = 1,
    gates: GateKind = "fsg",
    hidden_dim: int | None = None,
    geometry: bool = False,
    trunk_options: dict[str, Any] | None = None,
) -> MultiStreamSizer:
    """Return a ResNet of 0.2 M weights for frames of 64 pixels, gates after each stage.

    See :class:`MultiStreamSizer` for the arguments and
    :class:`endoscopy.models.trunks.TinyResNet` for ``trunk_options``.
    """
    return MultiStreamSizer(
        TINY_RESNET, streams, outputs, gates, hidden_dim, geometry, trunk_options
    )


def tiny_vit(
    streams: Streams = ("rgb_mask",),
    outputs: int = 1,
    gates: GateKind = "fsg",
    geometry: bool = False,
    trunk_options: dict[str, Any] | None = None,
) -> MultiStreamSizer:
    """Return a ViT of 0.5 M weights for frames of 64 pixels: 96 features, depth 4, patches of 8.

    See :func:`fsg_vit` for the arguments.
    """
    sizes = {"img_size": 64, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 4}
    options = sizes | (trunk_options or {})
    return fsg_vit("vit_tiny_patch16_224", streams, outputs, gates, geometry, options)
