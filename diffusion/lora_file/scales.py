"""The scale of an adapter: the α of each layer, settings in the header or of a folder of PEFT."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from diffusion.lora_file.container import ContainerError, clean, parse_json
from diffusion.lora_file.names import TRANSFORMER

HEADER_KEY = "lora_adapter_metadata"
_ALPHAS = ("lora_alpha", "alpha")
_DEFAULT = 8  # of PEFT, for rank and α
_NAME = re.compile(r"\^?[\w.\\-]+")
_RESIDUAL = ("pissa", "olora", "corda", "loftq", "eva")


class Settings(NamedTuple):
    """What PEFT states about the adapter of one network.

    Attributes:
        rank: r of layers without a pattern.
        alpha: α of layers without a pattern.
        ranks: Name of a layer, or its end, to r.
        alphas: Name of a layer, or its end, to α.
        stabilized: Whether the scale is α/√r (Kalajdzievski, 2023).
        dora: Whether every layer has a magnitude.
    """

    rank: int
    alpha: float
    ranks: Mapping[str, float]
    alphas: Mapping[str, float]
    stabilized: bool = False
    dora: bool = False

    def scale(self, layer: str, rank: int | None) -> float:
        """Return the scale of a layer.

        Args:
            layer: Name as in the file, without prefix.
            rank: Of the stored factors; None if they are whole.

        Raises:
            ValueError: The factors have another rank than the settings state.
        """
        stated = _of(self.ranks, layer, self.rank)
        if rank is not None and rank != stated:
            raise ValueError(f"its rank is {rank}, but the settings of the adapter state {stated}")
        alpha = _of(self.alphas, layer, self.alpha)
        return alpha / (math.sqrt(stated) if self.stabilized else stated)


def header_settings(metadata: Mapping[str, str]) -> dict[str, Settings]:
    """Return the settings in the header, by component; empty if there are none.

    Raises:
        ContainerError: It is damaged.
    """
    if HEADER_KEY not in metadata:
        return {}
    stated = parse_json(metadata[HEADER_KEY], f"the metadata {HEADER_KEY}")
    settings: dict[str, dict[str, Any]] = {}
    for key, value in stated.items():
        component, dot, name = key.rpartition(".")
        settings.setdefault(component if dot and component != "unet" else TRANSFORMER, {})[name] = (
            value
        )
    return {
        component: settings_of(values, f"the metadata {HEADER_KEY}")
        for component, values in settings.items()
        if "r" in values or any(name in values for name in _ALPHAS)
    }


def settings_of(values: Mapping[str, Any], source: str) -> Settings:
    """Check the settings of a LoRA, LoHa or LoKr adapter of PEFT.

    Raises:
        ContainerError: A value is of the wrong type, or the adapter needs more than its factors.
    """
    kind = values.get("peft_type") or "LORA"
    if kind not in ("LORA", "LOHA", "LOKR"):
        raise ContainerError(
            f"{source}: peft_type is {clean(json.dumps(kind), 40)}, expected LORA, LOHA or LOKR"
        )
    start = values.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_RESIDUAL):
        raise ContainerError(
            f"{source}: init_lora_weights is {clean(start, 40)}, which changes the base, too; "
            "convert the adapter to plain LoRA in PEFT"
        )
    if values.get("fan_in_fan_out"):
        raise ContainerError(f"{source}: fan_in_fan_out is set, but all layers are Linear layers")
    alpha = next((values[name] for name in _ALPHAS if values.get(name) is not None), _DEFAULT)
    rank = values.get("r") if values.get("r") is not None else _DEFAULT
    return Settings(
        int(_number(rank, "r", source, whole=True)),
        _number(alpha, "lora_alpha", source),
        _pattern(values.get("rank_pattern"), "rank_pattern", source, whole=True),
        _pattern(values.get("alpha_pattern"), "alpha_pattern", source),
        values.get("use_rslora") is True,
        values.get("use_dora") is True,
    )


def _of(patterns: Mapping[str, float], layer: str, default: float) -> Any:
    """Return the value of the first pattern that is the layer's name or its end, as in PEFT."""
    for pattern, value in patterns.items():
        name = pattern.replace("\\.", ".")
        if name.startswith("^"):
            if layer == name[1:]:
                return value
        elif layer == name or layer.endswith(f".{name}"):
            return value
    return default


def _pattern(value: Any, name: str, source: str, *, whole: bool = False) -> dict[str, float]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ContainerError(f"{source}: {name} must map names of layers to numbers")
    for pattern in value:
        if not _NAME.fullmatch(pattern):
            raise ContainerError(
                f"{source}: {name} holds {clean(pattern, 80)!r}, expected names of layers; "
                "regular expressions of a file are not executed"
            )
    return {
        k: _number(v, f"{name} of {clean(k, 80)}", source, whole=whole) for k, v in value.items()
    }


def _number(value: Any, name: str, source: str, *, whole: bool = False) -> float:
    good = type(value) is int or (type(value) is float and not whole)
    if not good or not abs(value) < 2**31 or (whole and value < 1):
        expected = "a positive integer" if whole else "a finite number"
        raise ContainerError(f"{source}: {name} is {clean(str(value), 40)}, expected {expected}")
    return value


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
UNTELLING = {"adapter_model", "pytorch_lora_weights"}
"""Stems that PEFT and diffusers give to every file: that of the folder is meant."""

_MAX_BYTES = 2**20


def locate(path: Path, config: Path | None) -> tuple[Path, Path | None]:
    """Return the file of weights, and its configuration if it has one.

    Args:
        path: The file, or the folder that holds it.
        config: The configuration, if it is elsewhere.

    Raises:
        ContainerError: The folder holds a pickle or no weights, or the path cannot be looked up.
    """
    try:
        weights = _weights_of(path) if path.is_dir() else path
        if config is None:
            configs = (weights.with_name(f"{weights.stem}.{CONFIG}"), weights.with_name(CONFIG))
            near = configs if weights.name == WEIGHTS else configs[:1]
            config = next((place for place in near if place.is_file()), None)
    except OSError as error:
        label = clean(str(path), 200)
        raise ContainerError(f"{label} cannot be opened: {error.strerror}") from error
    return weights, config


def name_of(weights: Path) -> str:
    """Return an adapter's name: the file's stem, or its folder's if all files share the stem."""
    return (weights.absolute().parent.name if weights.stem in UNTELLING else "") or weights.stem


def _weights_of(folder: Path) -> Path:
    weights = folder / WEIGHTS
    if weights.exists():
        return weights
    pickle = folder / "adapter_model.bin"
    held = f"the pickle {pickle.name}" if pickle.exists() else "no adapter"
    raise ContainerError(f"{clean(str(folder), 200)} holds {held}, expected {WEIGHTS}; name a file")


def config_settings(path: Path) -> Settings:
    """Read the configuration of an adapter of PEFT.

    Raises:
        ContainerError: It is missing, damaged or too large.
    """
    label = clean(str(path), 200)
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ContainerError(f"{label} cannot be read: {error.strerror}") from error
    if len(raw) > _MAX_BYTES:
        raise ContainerError(f"{label} is larger than the limit of {_MAX_BYTES} bytes")
    return settings_of(parse_json(raw, label), label)
