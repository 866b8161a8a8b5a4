"""What an encoder of adapters is built from: the layers that it reads, or why it cannot."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Self

from core_gates.errors import check_at_least, check_option
from diffusion.lora_file import FluxShape, LoraBundle, SD3Shape
from diffusion.lora_file.container import LoraFileError, clean, listed
from diffusion.lora_file.family import Placed

Shape = FluxShape | SD3Shape
SHAPES: dict[str, type[Shape]] = {"flux": FluxShape, "sd3": SD3Shape}
"""Family of models -> the numbers that its layers follow from."""


def family_of(shape: Shape) -> str:
    """Return the family of models that a shape belongs to."""
    return next(family for family, kind in SHAPES.items() if isinstance(shape, kind))


def modules_of(shape: Shape, types: Sequence[str] | None = None) -> tuple[Placed, ...]:
    """Return the fused layers of a base, in the order of the published encoder.

    A layer that has another number of outputs than the first one of its type, as in the last block
    of SD3, gets its own type, such as ``norm1_b.linear.3072``: one projection cannot serve both.

    Args:
        shape: Of the base.
        types: Types of layers that are kept; None for all.

    Raises:
        LoraFileError: A type does not exist in this base, or none is given.
    """
    first: dict[str, int] = {}
    placed = []
    for module in shape.fused():
        if module.out_features != first.setdefault(module.type, module.out_features):
            module = module._replace(type=f"{module.type}.{module.out_features}")
        placed.append(module)
    placed_types = dict.fromkeys(module.type for module in placed)
    unknown = [] if types is None else [kind for kind in types if kind not in placed_types]
    if unknown or (types is not None and not types):
        complaint = f"{', '.join(unknown)}, which this base lacks" if unknown else "none"
        raise LoraFileError(
            f"the types of layers name {complaint}; choose from {', '.join(placed_types)}"
        )
    return tuple(module for module in placed if types is None or module.type in types)


def types_used(shape: Shape, bundles: Sequence[LoraBundle]) -> tuple[str, ...]:
    """Return the types of layers that at least one of some adapters changes."""
    changed = {name for bundle in bundles for name in bundle.modules}
    used = [module.type for module in modules_of(shape) if changed.intersection(module.parts)]
    return tuple(dict.fromkeys(used))


class Fit(NamedTuple):
    """How the layers of an adapter fit those that an encoder reads.

    Attributes:
        read: Number of fused layers that are read.
        missing: Fused layers that the adapter does not change.
        misfits: Layers of another size, each with what was expected.
    """

    read: int
    missing: tuple[str, ...]
    misfits: tuple[str, ...]


def fit(bundle: LoraBundle, modules: Sequence[Placed]) -> Fit:
    """Compare the layers of an adapter with those that an encoder reads, by their sizes alone."""
    sizes = bundle.sizes()
    missing, misfits = [], []
    for module in modules:
        parts = [(part, out) for part, out in zip(module.parts, module.sizes, strict=True)]
        if not any(part in sizes for part in module.parts):
            missing.append(module.name)
        for part, out in parts:
            size = sizes.get(part)
            if size and (size.in_features, size.out_features) != (module.in_features, out):
                misfits.append(
                    f"{part} is {size.in_features} → {size.out_features}, "
                    f"expected {module.in_features} → {out}"
                )
    return Fit(len(modules) - len(missing), tuple(missing), tuple(misfits))


Normalization = Literal["none", "layer", "token", "file"]
Pooling = Literal["mean", "token"]
AttentionMask = Literal["bidirectional", "causal"]
Missing = Literal["mask", "token", "refuse"]
OPTIONS = {
    "normalization": ("none", "layer", "token", "file"),
    "pooling": ("mean", "token"),
    "attention_mask": ("bidirectional", "causal"),
    "missing": ("mask", "token", "refuse"),
}

COUNTS = ("num_layers", "num_single_layers")
MOST_LAYERS = 1024
"""Blocks of a base, or layers of the transformer, that a file of settings may ask for."""


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes and form of a `diffusion.retrieval.LoraWeightEncoder`.

    Attributes:
        shape: Of the base whose adapters are read.
        types: Types of layers that are read, such as ``attn.a_to_qkv``; None for all. Others of a
            file are ignored, and cost no projection.
        dim: Features of a token.
        text_dim: Features of the result, which a linear layer gives; None for ``dim`` without one.
        depth: Layers of the transformer.
        heads: Attention heads.
        head_dim: Features of a head.
        hidden_dim: Features of the hidden layer of its feed-forward networks.
        probes: Vectors that each layer of the base is probed with, a token each.
        normalization: Of the response of a layer to its probe. ``none``: as published. ``layer``:
            an affine LayerNorm per layer. ``token``: a root mean square of 1. ``file``: one factor
            for all layers of an adapter, so that only their relative sizes are left.
        pooling: ``mean`` over all tokens, or the result of a learned special ``token``.
        positions: Whether a learned position is added to each token.
        attention_mask: ``causal`` is that of the published mean-pooled encoder.
        missing: A layer that an adapter does not change is left out of attention and mean
            (``mask``), is shown to attention as a learned token of its type and left out of the
            mean (``token``), or is a reason to refuse the adapter (``refuse``, as published).

    Raises:
        ValueError: A size is not positive, or there is no such option.
        LoraFileError: The base has no layers of a type.
    """

    shape: Shape = field(default_factory=FluxShape)
    types: tuple[str, ...] | None = None
    dim: int = 64
    text_dim: int | None = 384
    depth: int = 2
    heads: int = 4
    head_dim: int = 16
    hidden_dim: int = 256
    probes: int = 1
    normalization: Normalization = "file"
    pooling: Pooling = "mean"
    positions: bool = True
    attention_mask: AttentionMask = "bidirectional"
    missing: Missing = "token"

    def __post_init__(self) -> None:
        for name in ("dim", "heads", "head_dim", "hidden_dim", "probes"):
            check_at_least(1, **{name: getattr(self, name)})
        check_at_least(1, text_dim=self.text_dim)
        check_at_least(0, depth=self.depth)
        for name, choices in OPTIONS.items():
            check_option(name, getattr(self, name), choices)
        modules_of(self.shape, self.types)

    @classmethod
    def published(cls, shape: Shape | None = None, **changes: Any) -> Self:
        """Return the encoder of AutoLoRA (arXiv 2508.02107), 112.9 M parameters for FLUX.1."""
        options: dict[str, Any] = {
            "text_dim": None, "dim": 768, "heads": 12, "head_dim": 64, "hidden_dim": 3072,
            "normalization": "none", "attention_mask": "causal", "missing": "refuse",
        }  # fmt: skip
        return cls(shape or FluxShape(), **{**options, **changes})

    @classmethod
    def prompt_token(cls, shape: Shape | None = None, **changes: Any) -> Self:
        """Return the encoder of DiffSynth-Studio, whose result is one more token of a prompt."""
        options: dict[str, Any] = {
            "text_dim": 4096, "dim": 4096, "depth": 1, "heads": 32, "head_dim": 128,
            "hidden_dim": 8192, "probes": 16, "normalization": "layer", "pooling": "token",
            "positions": False, "missing": "refuse",
        }  # fmt: skip
        return cls(shape or FluxShape(), **{**options, **changes})

    @property
    def out_dim(self) -> int:
        """Features of the result."""
        return self.dim if self.text_dim is None else self.text_dim

    def state(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        types = None if self.types is None else list(self.types)
        shape = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in self.shape._asdict().items()
        }
        return {"family": family_of(self.shape), **options, "shape": shape, "types": types}

    @classmethod
    def from_state(cls, state: object) -> Self:
        """Return the configuration of plain values.

        Raises:
            LoraFileError: A value is missing, unknown, or not of its kind.
        """
        try:
            return cls(**_options(dict(state)))  # type: ignore[call-overload]
        except (TypeError, ValueError, KeyError, LoraFileError) as error:
            reason = clean(str(error), 200)
            raise LoraFileError(f"the settings of the encoder are wrong: {reason}") from error


def _options(state: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a configuration, each of its kind.

    Raises:
        TypeError: A value is of another kind.
        KeyError: There is no such family or option.
    """
    kind, numbers = SHAPES[state.pop("family")], dict(state.pop("shape"))
    defaults = kind()._asdict()
    sizes: dict[str, Any] = {
        name: tuple(map(_whole, value))
        if isinstance(defaults[name], tuple)
        else _like(defaults[name], value)
        for name, value in numbers.items()
    }
    if any(sizes[name] > MOST_LAYERS for name in COUNTS if name in sizes):
        raise ValueError(f"a base has more than {MOST_LAYERS} blocks")
    types = state.pop("types")
    if isinstance(types, str) or not all(isinstance(kind, str) for kind in types or ()):
        raise TypeError("types are not names")
    fields = {f.name: f for f in dataclasses.fields(EncoderConfig)}
    for name, value in state.items():
        if name == "text_dim":
            state[name] = None if value is None else _whole(value)
        elif name not in OPTIONS:
            state[name] = _like(fields[name].default, value)
    if state["depth"] > MOST_LAYERS:
        raise ValueError(f"the transformer has more than {MOST_LAYERS} layers")
    return {**state, "shape": kind(**sizes), "types": None if types is None else tuple(types)}


def _like(default: object, value: Any) -> Any:
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise TypeError(f"{value!r} is not true or false")
        return value
    return _whole(value)


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 2**20:
        raise TypeError(f"{value!r} is not a size")
    return value


def refusal_of(bundle: LoraBundle, config: EncoderConfig) -> str | None:
    """Return one line about why an adapter cannot be read, by names and sizes; None if it can.

    Args:
        bundle: The adapter.
        config: Of the encoder.
    """
    family = family_of(config.shape)
    if bundle.family != family:
        return f"it is an adapter of {bundle.family}, and the encoder was trained on {family}"
    fitted = fit(bundle, modules_of(config.shape, config.types))
    if fitted.misfits:
        return f"it belongs to a base of another size: {listed(list(fitted.misfits), 1)}"
    if not fitted.read:
        return "it changes no layer that the encoder reads"
    if fitted.missing and config.missing == "refuse":
        return f"the encoder needs all layers, and it lacks {listed(list(fitted.missing))}"
    return None
