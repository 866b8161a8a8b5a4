"""Networks of one to several streams that size the polyp in a frame, and pretrained weights."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import load_file
from torch import Tensor, nn

from core_gates import FeatureSelectionGate, fold_gates
from core_gates.errors import GatesError, check_at_least
from core_gates.features.selection import scale_inputs
from core_gates.surgery import gate_hosts
from endoscopy.data.streams import STREAMS
from endoscopy.models.trunks import (
    STATIC,
    TINY_RESNET,
    GateKind,
    build_trunk,
    gate_trunk,
    head_gate,
)

NUM_GEOMETRY = 4
"""Log width and height of the box relative to the frame, and its center."""


class LinearHead(nn.Module):
    """One linear map, as a ViT has it.

    Args:
        dim: Features of all streams together.
        outputs: Numbers that the network returns.
        num_geometry: Further inputs, which no gate precedes.

    Shape:
        Features (B, dim) and geometry (B, num_geometry) to (B, outputs).
    """

    def __init__(self, dim: int, outputs: int, num_geometry: int = 0) -> None:
        super().__init__()
        self.fc = nn.Linear(dim + num_geometry, outputs)

    def forward(self, features: Tensor, geometry: Tensor | None = None) -> Tensor:
        """Return the output, without activation."""
        return self.fc(_join(features, geometry))

    def fold_(self, scores: Tensor) -> None:
        """Multiply scores (dim,) of the features into the weights."""
        scale_inputs(self.fc, _extend(scores, self.fc))


class GatedHead(nn.Module):
    """The gated fusion of streams (arXiv 2407.04400).

    ``W3 (s(L2) * relu(W2 (s(L1) * e) + b2)) + b3`` with gates L1 and L2.

    Args:
        dim: Features e of all streams together.
        hidden_dim: Features between the two layers.
        outputs: Numbers that the network returns.
        gates: Kind of the gates L1 and L2.
        num_geometry: Further inputs of the first layer, which no gate precedes.

    Shape:
        Features (B, dim) and geometry (B, num_geometry) to (B, outputs).
    """

    def __init__(
        self, dim: int, hidden_dim: int, outputs: int, gates: GateKind, num_geometry: int = 0
    ) -> None:
        super().__init__()
        self.gate1 = head_gate(gates, dim)
        self.fc2 = nn.Linear(dim + num_geometry, hidden_dim)
        self.gate2 = head_gate(gates, hidden_dim)
        self.fc3 = nn.Linear(hidden_dim, outputs)

    def forward(self, features: Tensor, geometry: Tensor | None = None) -> Tensor:
        """Return the output, without activation."""
        hidden = torch.relu(self.fc2(_join(self.gate1(features), geometry)))
        return self.fc3(self.gate2(hidden))

    def fold_(self, scores: Tensor) -> None:
        """Fold scores (dim,) of the features and both gates into the weights; drop the gates."""
        if isinstance(self.gate1, FeatureSelectionGate):
            scores = scores * self.gate1.scores()
        if isinstance(self.gate2, FeatureSelectionGate):
            self.gate2.fold_into(self.fc3, "input")
        scale_inputs(self.fc2, _extend(scores, self.fc2))
        self.gate1, self.gate2 = nn.Identity(), nn.Identity()


def _join(features: Tensor, geometry: Tensor | None) -> Tensor:
    return features if geometry is None else torch.cat([features, geometry.to(features)], 1)


def _extend(scores: Tensor, layer: nn.Linear) -> Tensor:
    """Return the scores with ones for the geometry, which has no gate."""
    return torch.cat([scores, scores.new_ones(layer.in_features - len(scores))])


Streams = Sequence[str | tuple[str, int]] | Mapping[str, int]


class MultiStreamSizer(nn.Module, PyTorchModelHubMixin):
    """A gated trunk for each stream, joined by a head (arXiv 2407.04400).

    Args:
        trunk: ``tiny_resnet`` or any model of timm, built for each stream.
        streams: Names of the streams, in the order in which their features are joined; those that
            `endoscopy.data.streams.STREAMS` does not know with their number of
            channels, as pairs or all in a mapping.
        outputs: Numbers that the network returns: 1 for millimeters, more for ordinal or classes.
        gates: Kind of the gates, see `endoscopy.models.trunks.gate_trunk`.
        hidden_dim: Features between the two layers of a gated head; None for one linear map.
        geometry: Whether the head also reads the box: log width and height, and center.
        trunk_options: Other arguments of the trunk.

    Attributes:
        arguments: What the network was made with, to make a variant of it.

    Shape:
        Streams (B, C, H, W) by name and geometry (B, 4) to (B, outputs), without activation.

    Raises:
        ValueError: An argument is unknown, or there is no place for such gates.
    """

    def __init__(
        self,
        trunk: str = "resnet18",
        streams: Streams = ("rgb",),
        outputs: int = 1,
        gates: GateKind = "fsg",
        hidden_dim: int | None = 128,
        geometry: bool = False,
        trunk_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        channels = channels_of(streams)
        check_at_least(1, outputs=outputs, hidden_dim=hidden_dim)
        self.arguments: dict[str, Any] = {
            "trunk": trunk,
            "streams": [
                n if STREAMS.get(n) == count else [n, count] for n, count in channels.items()
            ],
            "outputs": outputs,
            "gates": gates,
            "hidden_dim": hidden_dim,
            "geometry": geometry,
            "trunk_options": dict(trunk_options or {}),
        }
        self._hub_mixin_config = self.arguments  # a mapping would be saved in another order
        self.outputs, self.geometry = outputs, geometry
        self.branches = nn.ModuleDict()
        dim = num_gates = 0
        for name, count in channels.items():
            self.branches[name], num_features = build_trunk(trunk, count, trunk_options or {})
            num_gates += gate_trunk(self.branches[name], gates)
            dim += num_features
        extra = NUM_GEOMETRY if geometry else 0
        self.head: LinearHead | GatedHead
        if hidden_dim is None:
            self.head = LinearHead(dim, outputs, extra)
        else:
            self.head = GatedHead(dim, hidden_dim, outputs, gates, extra)
        in_head = hidden_dim is not None and gates in STATIC
        if gates != "none" and not num_gates and not in_head:
            raise ValueError(f"trunk {trunk!r} has no place for gates {gates!r}; choose 'none'")

    def forward(self, streams: Mapping[str, Tensor], geometry: Tensor | None = None) -> Tensor:
        """Return the raw output (B, outputs).

        Args:
            streams: Normalized images by name of the stream; those that the network does not read
                are ignored.
            geometry: Log width, log height and center (x, y) of the box relative to the frame,
                (B, 4); needed by a network with ``geometry``, otherwise ignored.

        Raises:
            GatesError: A stream or the geometry is missing.
        """
        if missing := [name for name in self.branches if name not in streams]:
            raise GatesError(
                f"the data make the streams {', '.join(streams)} and the network also reads"
                f" {', '.join(missing)}: set --data.streams to [{', '.join(self.branches)}]"
            )
        if self.geometry and geometry is None:
            raise GatesError("the network reads the geometry of the box, but the batch has none")
        features = [trunk(streams[name]) for name, trunk in self.branches.items()]
        joined = features[0] if len(features) == 1 else torch.cat(features, 1)
        return self.head(joined, geometry if self.geometry else None)


def channels_of(streams: Streams) -> dict[str, int]:
    """Return the number of channels of each stream by name.

    Raises:
        ValueError: A name is unknown or comes twice, or there is none.
    """
    if isinstance(streams, str):
        raise ValueError(f"streams is {streams!r}; expected a list such as ['{streams}']")
    channels: dict[str, int] = {}
    for pair in streams.items() if isinstance(streams, Mapping) else streams:
        name, count = (pair, STREAMS.get(pair, 0)) if isinstance(pair, str) else pair
        if count < 1:
            raise ValueError(f"unknown stream {name!r}; choose from {', '.join(STREAMS)}")
        channels[name] = count
    if not channels or len(channels) < len(streams):
        raise ValueError(f"streams must name at least one, each once; found {list(streams)}")
    return channels


@torch.no_grad()
def fold(model: MultiStreamSizer) -> MultiStreamSizer:
    """Return the network with its static gates multiplied into the weights, in evaluation.

    It computes what ``model.eval()`` computes, up to rounding, with the operations of a network
    built with ``gates="none"``, which it is. The gates of the last stage of a ResNet and L1 go into
    the columns of the first layer of the head, L2 into those of the second. Attention that depends
    on the image (``se``) stays as it is.

    Args:
        model: Any sizing network; it is not changed.
    """
    twin = copy.deepcopy(model).eval()
    if model.arguments["gates"] not in STATIC:
        return twin
    twin.head.fold_(torch.cat([_fold_trunk(trunk, twin) for trunk in twin.branches.values()]))
    twin.arguments["gates"] = "none"  # the form in which it is saved
    return twin


def _fold_trunk(trunk: nn.Module, model: MultiStreamSizer) -> Tensor:
    """Fold all gates that precede weights; return what the head must absorb."""
    hosts = gate_hosts(trunk)
    stages = [name for name, host in hosts.items() if isinstance(host.module, nn.Sequential)]
    if not stages:
        fold_gates(trunk)
        width = next(model.head.parameters())
        dim = int(trunk.num_features)  # type: ignore[arg-type]
        return torch.ones(dim, device=width.device, dtype=width.dtype)
    fold_gates(trunk, where=stages[:-1])
    last: Any = trunk.get_submodule(stages[-1])
    scores: Tensor = last.gate.scores()
    del last.gate
    return scores


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
        streams: See `MultiStreamSizer`.
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

    See `fsg_vit` for the arguments.
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
    ``depth``, in this order. See `MultiStreamSizer` for the arguments.
    """
    return MultiStreamSizer(
        "resnet18", streams, outputs, gates, hidden_dim, geometry, trunk_options
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

    See `MultiStreamSizer` for the arguments and
    `endoscopy.models.trunks.TinyResNet` for ``trunk_options``.
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

    See `fsg_vit` for the arguments.
    """
    sizes = {"img_size": 64, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 4}
    options = sizes | (trunk_options or {})
    return fsg_vit("vit_tiny_patch16_224", streams, outputs, gates, geometry, options)


ADDED = (".gate.", ".attention.")  # what is added to a trunk, and missing from files of timm
HEADS = ("fc.", "head.", "head_dist.", "classifier.", "head.fc.")
WRAPPERS = ("state_dict", "model", "model_state", "module")


class LoadedWeights(NamedTuple):
    """What was loaded into the trunk of one stream.

    Attributes:
        loaded: Number of tensors taken from the file.
        fresh: Tensors that keep their random start: gates, and the stem of a stream whose images
            have another number of channels.
        resampled: Position embeddings that were resampled to another image size.
    """

    loaded: int
    fresh: tuple[str, ...]
    resampled: tuple[str, ...]


def load_timm_weights(
    model: MultiStreamSizer, path: str | Path, streams: Sequence[str] | None = None
) -> dict[str, LoadedWeights]:
    """Load a state dict of timm or torchvision into the trunks, all but their gates.

    The classifier of the file is ignored, and so is a stem with other input channels.

    Args:
        model: The network, changed in place.
        path: ``.safetensors``, or a file of ``torch.save`` that holds tensors alone.
        streams: Streams whose trunks to load; all when None.

    Returns:
        What was loaded, by stream.

    Raises:
        GatesError: The file is absent or damaged, or belongs to another model; then nothing is
            changed.
    """
    state = _read(Path(path))
    if unknown := [name for name in streams or () if name not in model.branches]:
        raise GatesError(f"no stream {unknown}: the network has {', '.join(model.branches)}")
    fitted = {
        name: _fit(model.branches[name], state, Path(path).name)
        for name in streams or model.branches
    }
    for name, (tensors, _) in fitted.items():
        model.branches[name].load_state_dict(tensors, strict=False)
    return {name: report for name, (_, report) in fitted.items()}


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise GatesError(f"no weights at {path}: give a .safetensors or .pth file of timm")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise GatesError(
            f"{path} is damaged or holds more than tensors ({type(error).__name__}): expected a"
            " state dict"
        ) from error
    for wrapper in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise GatesError(f"{path} holds no state dict: expected tensors by name")
    return state


def _fit(
    trunk: nn.Module, state: dict[str, Tensor], file: str
) -> tuple[dict[str, Tensor], LoadedWeights]:
    state_of_trunk = trunk.state_dict()
    tensors: dict[str, Tensor] = {}
    fresh: list[str] = []
    resampled: list[str] = []
    wrong: list[str] = []
    for name, mine in state_of_trunk.items():
        theirs = state.get(name)
        if theirs is None:
            is_added = any(mark in f".{name}" for mark in ADDED) or name.endswith("tracked")
            (fresh if is_added else wrong).append(name if is_added else f"lacks {name}")
        elif theirs.shape == mine.shape:
            tensors[name] = theirs
        elif _is_stem(mine, theirs):
            fresh.append(name)
        elif name == "pos_embed":
            tensors[name] = _resample(trunk, theirs)
            resampled.append(name)
        else:
            wrong.append(f"has {name} {tuple(theirs.shape)}, not {tuple(mine.shape)}")
    wrong += [
        f"has {n} besides" for n in state if n not in state_of_trunk and not n.startswith(HEADS)
    ]
    if wrong:
        shown = "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise GatesError(
            f"{file} does not fit the trunk {type(trunk).__name__}: it {shown}:"
            " give the weights of the same model"
        )
    return tensors, LoadedWeights(len(tensors), tuple(fresh), tuple(resampled))


def _is_stem(mine: Tensor, theirs: Tensor) -> bool:
    """Whether a convolution differs only in its input channels, those of an image in the file."""
    if mine.ndim != 4 or theirs.ndim != 4 or theirs.shape[1] != 3:
        return False
    return mine.shape[0] == theirs.shape[0] and mine.shape[2:] == theirs.shape[2:]


def _resample(trunk: nn.Module, theirs: Tensor) -> Tensor:
    prefix = 0 if trunk.no_embed_class else int(trunk.num_prefix_tokens)  # type: ignore[arg-type]
    grid = list(trunk.patch_embed.grid_size)  # type: ignore[union-attr,arg-type]
    from timm.layers import resample_abs_pos_embed  # see endoscopy.models.trunks

    return resample_abs_pos_embed(theirs, new_size=grid, num_prefix_tokens=prefix)
