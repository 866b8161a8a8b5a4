"""The dialects that files are written in: those of programs, and that of a file that was read."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusion.lora_file.bundle import LoraBundle, fuse
from diffusion.lora_file.container import FormatError, LoraFileError, listed
from diffusion.lora_file.factors import Factors, Sizes
from diffusion.lora_file.family import FAMILIES, index_of
from diffusion.lora_file.mapping_report import Dialect
from diffusion.lora_file.names import (
    BFL_FLUX,
    NATIVE_SD3,
    OWN,
    TABLES,
    TRANSFORMER,
    UNET_TABLES,
    UNETS,
    NameTable,
)

STALE = {
    "lora_adapter_metadata",
    "sshs_model_hash",
    "sshs_legacy_hash",
    "modelspec.hash_sha256",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_module",
    "ss_network_args",
    "format",
}  # metadata that describes the former file


class Layout(NamedTuple):
    """An adapter in a format.

    Attributes:
        tensors: By name, not yet in the dtype of the file.
        metadata: Text of the header.
        config: Content of ``adapter_config.json``; None for formats of a single file.
        exact: Names of tensors that keep their dtype, such as α.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    config: dict[str, Any] | None = None
    exact: frozenset[str] = frozenset()


def kept_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata that is true of the new file, too."""
    return {key: text for key, text in metadata.items() if key not in STALE} | {"format": "pt"}


def refuse(format_name: str, names: list[str], why: str) -> None:
    """Refuse an adapter if there are layers that a format cannot store.

    Raises:
        FormatError: ``names`` is not empty.
    """
    if names:
        raise FormatError(
            f"the format {format_name} cannot store {listed(sorted(names), 8)}: {why}; "
            "choose another format"
        )


def most_common(values: Iterable[float]) -> float:
    """Return the most frequent value, the smallest of several."""
    count = Counter(values)
    return min(count, key=lambda value: (-count[value], value))


def in_storage(tensor: Tensor, dtype: torch.dtype, exact: bool) -> Tensor:
    """Return a tensor in the dtype of a file.

    Args:
        tensor: As computed.
        dtype: Wanted; float8 is written as bfloat16, which holds the same values.
        exact: Keep float32 where a value would change.
    """
    if dtype.itemsize == 1:
        dtype = torch.bfloat16
    stored = tensor.to(dtype)
    if exact and not torch.equal(stored.to(tensor.dtype), tensor):
        return tensor if tensor.dtype == torch.float64 else tensor.float()
    return stored


def alpha_of(factors: Factors) -> float:
    """Return the α that gives the scale of a layer, α/r."""
    return factors.scale * factors.rank


def stored_pair(factors: Factors) -> tuple[Tensor, Tensor]:
    """Return A and B as files hold them, those of a convolution with four dimensions."""
    down, up, kernel = factors.down, factors.up, factors.kernel
    if kernel is None:
        return down, up
    return down.reshape(factors.rank, -1, *kernel), up[:, :, None, None]


_NATIVE: dict[str, NameTable] = {"flux": BFL_FLUX, "sd3": NATIVE_SD3}


class Naming(NamedTuple):
    """How a dialect names the layers of one network.

    Attributes:
        prefix: Before each layer.
        down: End of the name of A, such as ``lora_down.weight``.
        underscored: Whether underscores replace the dots of layers.
        table: Names of layers; None for those of diffusers, of transformers or of the file.
    """

    prefix: str
    down: str
    underscored: bool = False
    table: NameTable | None = None


class Style(NamedTuple):
    """A dialect of files.

    Attributes:
        name: For messages.
        networks: ``transformer`` or a text encoder, to how its layers are named.
        alpha: Whether α is stored; otherwise the scale is multiplied into B.
    """

    name: str
    networks: Mapping[str, Naming]
    alpha: bool = True

    def __str__(self) -> str:
        """Return its name."""
        return self.name

    @property
    def fuses(self) -> bool:
        """Whether layers are one that are apart in diffusers."""
        tables = (naming.table for naming in self.networks.values())
        return any(len(row.parts) > 1 for table in tables if table for row in table.rows.values())


ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
_CLIP_L, _CLIP_G, _T5 = (
    f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_g", "t5xxl")
)
_BEFORE_TEXT: dict[str, dict[str, tuple[str, ...]]] = {
    "lora_unet_": {
        "flux": ("lora_te1_", "lora_te3_"),
        "sd3": ("lora_te1_", "lora_te2_", "lora_te3_"),
        "sdxl": ("lora_te1_", "lora_te2_"),
        **dict.fromkeys(("sd1", "sd2", "unet"), ("lora_te_",)),
    },
    "diffusion_model.": {"flux": (_CLIP_L, _T5), "sd3": (_CLIP_L, _CLIP_G, _T5)},
    **{f"{network}.": dict.fromkeys(("flux", "sd3", *UNETS), tuple(f"{n}." for n in ENCODERS))
       for network in (TRANSFORMER, "unet")},
}  # fmt: skip
"""What the layers of text encoders begin with, by the prefix of the image model, and family."""


def _with_encoders(naming: Naming, family: str) -> dict[str, Naming]:
    """Return how an image model and the text encoders next to it are named."""
    before = _BEFORE_TEXT.get(naming.prefix, {}).get(family, ())
    others = {
        n: naming._replace(prefix=p, table=None) for n, p in zip(ENCODERS, before, strict=False)
    }
    return {TRANSFORMER: naming, **others}


def program_style(format: str, family: str) -> Style | None:
    """Return the dialect of ``kohya``, ``comfyui`` or ``bfl``; None for other formats."""
    table = _NATIVE.get(family)
    namings = {
        "kohya": Naming("lora_unet_", "lora_down.weight", True, table),
        "comfyui": Naming("diffusion_model.", "lora_A.weight", False, table),
        "bfl": Naming("", "lora_A.weight", False, table),
    }
    if format not in namings:
        return None
    return Style(format, _with_encoders(namings[format], family), alpha=format != "bfl")


_A = re.compile(r"lora_A|down")


def style_of(bundle: LoraBundle) -> Style | str:
    """Return the dialect of the file that an adapter was read from, or ``diffusers`` if it is that.

    Of several dialects it is the most frequent one. Factors of other kinds are named as kohya's.

    Raises:
        FormatError: It changes no layer of the image model.
    """
    assert bundle.report is not None
    counts: dict[str, Counter[Dialect]] = {}
    for fate in bundle.report.used:
        if fate.dialect is not None:
            ranked = fate.dialect._replace(kind="" if _A.search(fate.dialect.factors) else "other")
            counts.setdefault(fate.component, Counter())[ranked] += 1
    alpha = any(one.factors == "alpha" for count in counts.values() for one in count)
    usual = {n: min(c, key=lambda one: (one.kind, -c[one])) for n, c in counts.items()}
    namings = {name: _naming(dialect, bundle.family) for name, dialect in usual.items()}
    if TRANSFORMER not in namings:
        raise FormatError(
            "the first file changes text encoders alone, expected layers of the image model: name"
            " another file first"
        )
    first, network = namings[TRANSFORMER], network_of(bundle.family)
    if first == Naming(f"{network}.", "lora_A.weight") and not alpha:
        return "diffusers"
    return Style(str(usual[TRANSFORMER]), _with_encoders(first, bundle.family) | namings, alpha)


def own_style(bundle: LoraBundle, format: str) -> Style | str | None:
    """Return the dialect of the file that an adapter was read from, if it is that of a format.

    Raises:
        FormatError: See `style_of`.
    """
    own = style_of(bundle)
    found, wanted = (
        style.networks[TRANSFORMER]._replace(table=None) if isinstance(style, Style) else style
        for style in (own, program_style(format, bundle.family) or format)
    )
    return own if found == wanted else None


def _naming(dialect: Dialect, family: str) -> Naming:
    of_family = "unet" if family in UNETS else family
    table = next(
        (t for t in (*TABLES, *UNET_TABLES) if (t.name, t.family) == (dialect.names, of_family)),
        None,
    )
    down = "lora_down.weight" if dialect.kind else dialect.factors.replace(".*", "")
    if down.startswith("_lora."):
        down = down.removeprefix("_lora.") if table else "lora_linear_layer.down.weight"
    names = None if dialect.names == "diffusers" else table
    return Naming(dialect.prefix, down, dialect.underscored, names)


def network_of(family: str) -> str:
    """Return what diffusers calls the image model of a family."""
    return "unet" if family in UNETS else TRANSFORMER


def refuse_unlike(adapters: Mapping[str, LoraBundle]) -> None:
    """Refuse adapters whose layers cannot be given the names of the first.

    Raises:
        FormatError: They are named.
    """
    first = next(iter(adapters.values()))
    for name, bundle in adapters.items():
        assert bundle.report is not None
        assert first.report is not None
        kinds = {one.kind for one in bundle.report.dialects} - {"", "lora"}
        if kinds and bundle.family not in FAMILIES:
            raise FormatError(
                f"{name!r} holds factors of {kinds.pop()}, which tell no kernel: only LoRA and"
                " LoCon are written"
            )
        wanted = [dialect.prefix for dialect in first.report.dialects[:1]]
        for fate in bundle.report.used:
            dialect = fate.dialect
            if dialect and dialect.names == OWN and dialect.prefix not in wanted:
                raise FormatError(
                    f"{name!r} has a layer {fate.key}, named otherwise than in the first file; no"
                    f" table translates names of {bundle.family}: merge files of one program"
                )


def laid_out(bundle: LoraBundle, style: Style) -> Layout:
    """Lay an adapter out in a dialect.

    Raises:
        FormatError: The dialect has no name for a layer, or only some parts of a fused layer are
            DoRA adapters.
    """
    tensors: dict[str, Tensor] = {}
    exact, metadata = set(), kept_metadata(bundle.metadata)
    usual = most_common(bundle.ranks().values() or [1])  # diffusers takes one α for a U-Net
    for component, modules in {TRANSFORMER: bundle.modules, **bundle.text_encoders}.items():
        naming = style.networks.get(component)
        if naming is None:
            refuse(style.name, [f"{component}.{n}" for n in modules], "it has no name for them")
            continue
        if naming.table is not None:
            modules = _native(bundle, style.name, naming.table)
        up_name = naming.down.replace("lora_A", "lora_B").replace("down", "up")
        for layer in modules:
            factors = modules[layer]
            name = naming.prefix + (layer.replace(".", "_") if naming.underscored else layer)
            down, up = stored_pair(factors)
            tensors[f"{name}.{naming.down}"] = down
            tensors[f"{name}.{up_name}"] = up if style.alpha else factors.scale * up
            if style.alpha:
                alpha = alpha_of(factors)
                if bundle.family in UNETS:
                    tensors[f"{name}.{up_name}"], alpha = alpha / usual * up, usual
                tensors[f"{name}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
                exact.add(f"{name}.alpha")
            if factors.magnitude is not None:
                tensors[f"{name}.dora_scale"] = factors.magnitude
        if naming.underscored and component == TRANSFORMER:
            dims = bundle.ranks().values()
            metadata["ss_network_dim"] = f"{most_common(dims):.0f}" if dims else "0"
    return Layout(tensors, metadata, exact=frozenset(exact))


def _native(bundle: LoraBundle, format_name: str, table: NameTable) -> dict[str, Factors]:
    """Return the factors under the names of a table; layers that are called as in the file stay.

    Raises:
        FormatError: A layer has no such name, or its parts cannot be fused.
    """
    sizes = bundle.sizes()
    blocks = sorted({index for name in sizes if (index := index_of(name)) is not None})
    layers: dict[str, Factors] = {}
    left, unfusable = set(sizes), []
    for templates, (native, swapped) in table.inverse().items():
        for block in blocks if "{i}" in native else [0]:
            parts = [template.replace("{i}", str(block)) for template in templates]
            if not left.intersection(parts):
                continue
            left -= set(parts)
            try:
                factors = _fused(bundle, parts, sizes)
            except LoraFileError:
                unfusable += [part for part in parts if part in sizes]
                continue
            last = swapped == "last" and factors.out_features == 2 * factors.in_features
            exchanged = swapped == "always" or last
            name = native.replace("{i}", str(block))
            layers[name] = factors.swapped() if exchanged else factors
    named = UNET_TABLES[0].rows if bundle.family in UNETS else left
    refuse(format_name, sorted(left.intersection(named)), "it has no name for them")
    refuse(format_name, unfusable, "they are one layer there, of which all or no parts are DoRA")
    return layers | {name: bundle.modules[name] for name in left}


def _fused(bundle: LoraBundle, parts: list[str], sizes: Mapping[str, Sizes]) -> Factors:
    if len(parts) == 1:
        return bundle.modules[parts[0]]
    family = FAMILIES[bundle.family]
    inputs = next(sizes[part].in_features for part in parts if part in sizes)
    outputs = [
        sizes[part].out_features if part in sizes else family.out_features(part, inputs) or 0
        for part in parts
    ]
    return fuse([bundle.modules.get(part) for part in parts], outputs)
