"""Folders as PEFT writes them: ``adapter_config.json`` next to ``adapter_model.safetensors``."""

from pathlib import Path

from diffusion.lora_file.container import clean, parse_json
from diffusion.lora_file.errors import ContainerError
from diffusion.lora_file.scales import Settings, settings_of

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
            own = (weights.with_name(f"{weights.stem}.{CONFIG}"), weights.with_name(CONFIG))
            near = own if weights.name == WEIGHTS else own[:1]
            config = next((place for place in near if place.is_file()), None)
    except OSError as error:
        label = clean(str(path), 200)
        raise ContainerError(f"{label} cannot be opened: {error.strerror}") from error
    return weights, config


def name_of(weights: Path) -> str:
    """Return what a file is called: its stem, or the folder where every file has that stem."""
    folder = weights.absolute().parent.name if weights.stem in UNTELLING else ""
    return folder or weights.stem


def _weights_of(folder: Path) -> Path:
    weights = folder / WEIGHTS
    if weights.exists():
        return weights
    pickle = folder / "adapter_model.bin"
    found = f"the pickle {pickle.name}" if pickle.exists() else "no adapter"
    raise ContainerError(
        f"{clean(str(folder), 200)} holds {found}, expected {WEIGHTS}; name a file"
    )


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
