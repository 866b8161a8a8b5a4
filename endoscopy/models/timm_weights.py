"""Pretrained weights of timm from a local file."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from core_gates.errors import GatesError
from endoscopy.models.sizer import MultiStreamSizer

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
    own = trunk.state_dict()
    tensors: dict[str, Tensor] = {}
    fresh: list[str] = []
    resampled: list[str] = []
    wrong: list[str] = []
    for name, mine in own.items():
        theirs = state.get(name)
        if theirs is None:
            known = any(mark in f".{name}" for mark in ADDED) or name.endswith("tracked")
            (fresh if known else wrong).append(name if known else f"lacks {name}")
        elif theirs.shape == mine.shape:
            tensors[name] = theirs
        elif _is_stem(mine, theirs):
            fresh.append(name)
        elif name == "pos_embed":
            tensors[name] = _resample(trunk, theirs)
            resampled.append(name)
        else:
            wrong.append(f"has {name} {tuple(theirs.shape)}, not {tuple(mine.shape)}")
    wrong += [f"has {n} besides" for n in state if n not in own and not n.startswith(HEADS)]
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
