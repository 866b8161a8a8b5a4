"""Pipelines from local files: folders of diffusers, GGUF files of FLUX, the embedded base."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from diffusers import (
    FluxPipeline,
    FluxTransformer2DModel,
    GGUFQuantizationConfig,
    StableDiffusion3Pipeline,
)
from diffusers.utils.logging import disable_progress_bar
from safetensors import SafetensorError
from torch import nn

from core_gates.errors import GatesError, MissingExtraError, check_option
from diffusion.models.base import CONFIG, KIND, EmbeddedBase

Offload = Literal["none", "model", "sequential", "group"]

INDEX = "model_index.json"
PIPELINES: dict[str, Any] = {
    "FluxPipeline": FluxPipeline,
    "StableDiffusion3Pipeline": StableDiffusion3Pipeline,
}
LIBRARIES = ("diffusers", "transformers")
"""Whose classes the parts of a pipeline may be of."""

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SHOWN = 160
"""Letters of a message of a library that are passed on."""


class LoadedPipeline(NamedTuple):
    """A pipeline, and the base that it is of.

    Attributes:
        pipe: The unmodified pipeline of diffusers.
        base: The embedded base, whose prompts are to be encoded by its text encoder; None for any
            other model, whose pipeline does it.
    """

    pipe: Any
    base: EmbeddedBase | None = None


def load_pipeline(
    path: str | Path,
    *,
    components: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    offload: Offload = "none",
    device: str | torch.device | None = None,
) -> LoadedPipeline:
    """Read a pipeline for fusion, its transformer frozen. Nothing is downloaded or unpickled.

    Args:
        path: A folder of a ``FluxPipeline`` or ``StableDiffusion3Pipeline`` as diffusers saves it,
            a GGUF file of the transformer of FLUX, or the folder of an embedded base.
        components: For a GGUF file: folder of a pipeline with all other parts and the
            configuration of the transformer.
        dtype: Of the parameters; quantized ones stay as they are.
        offload: What keeps memory of the device low: one ``model`` at a time on it, one layer
            (``sequential``), or one ``group`` of layers.
        device: Where to compute; the accelerator, if there is one, by default.

    Raises:
        GatesError: There is no such pipeline, it is incomplete or damaged, holds pickled weights
            only, or is of another class.
    """
    check_option("offload", offload, get_args(Offload), GatesError)
    path = Path(path)
    base = None
    if path.suffix.lower() == ".gguf" and not path.is_dir():
        pipe = _with_gguf(path, components, dtype)
    elif _is_embedded(path):
        base = EmbeddedBase.load(path)
        for part in (base.transformer, base.vae):
            nn.Module.to(cast(nn.Module, part), dtype)  # its own warns of parts in float32
        pipe = base.pipeline()
    else:
        pipe = _from_folder(path, dtype)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.requires_grad_(False)
    place(pipe, offload, torch.device(device) if device is not None else _accelerator())
    return LoadedPipeline(pipe, base)


def place(pipe: Any, offload: Offload, device: torch.device) -> None:
    """Put a pipeline on a device, all of it or what is needed at a time.

    Args:
        pipe: A pipeline of diffusers.
        offload: As of :func:`load_pipeline`.
        device: Where to compute.

    Raises:
        GatesError: Layers are to be moved to the processor, where they are.
    """
    if offload == "sequential" and device.type == "cpu":
        raise GatesError("offload='sequential' needs an accelerator, found none: use 'none'")
    if offload == "none":
        pipe.to(device)
    elif offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.enable_group_offload(onload_device=device, offload_type="leaf_level")


def _is_embedded(path: Path) -> bool:
    """Return whether a folder describes an embedded base; a whole pipeline does not."""
    if not (path / CONFIG).is_file() or (path / INDEX).is_file():
        return False
    try:
        found = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True  # loading it says what is wrong
    return isinstance(found, dict) and found.get("kind") == KIND


def _from_folder(path: Path, dtype: torch.dtype, **parts: Any) -> Any:
    kind, absent = _checked_index(path, set(parts))
    parts = dict.fromkeys(absent) | parts
    disable_progress_bar()
    with _one_line(path):
        return PIPELINES[kind].from_pretrained(
            str(path), dtype=dtype, use_safetensors=True, local_files_only=True, **parts
        )


def _checked_index(path: Path, given: set[str]) -> tuple[str, list[str]]:
    """Return the class of the pipeline in a folder and the parts that it is without.

    Args:
        path: The folder.
        given: Parts that are not read from it.
    """
    try:
        index = json.loads((path / INDEX).read_text(encoding="utf-8"))
        kind = index.pop("_class_name")
        parts = {name: part for name, part in index.items() if isinstance(part, list)}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise GatesError(
            f"{path} holds no pipeline ({INDEX} is missing or damaged): give a folder that"
            " diffusers saved, a .gguf file with components, or an embedded base"
        ) from error
    if kind not in PIPELINES:
        raise GatesError(f"{path} is a {kind}: fusion takes {' or '.join(PIPELINES)}")
    absent = [name for name, part in parts.items() if part == [None, None]]
    for name, part in parts.items():
        if name in given or name in absent:
            continue
        if len(part) != 2 or part[0] not in LIBRARIES:
            raise GatesError(f"{path / INDEX}: {name} is of {part}, not of {', '.join(LIBRARIES)}")
        _check_part(path / name, is_model="tokenizer" not in name and name != "scheduler")
    return str(kind), absent


def _check_part(folder: Path, *, is_model: bool) -> None:
    if not folder.is_dir():
        raise GatesError(f"{folder} is missing: get the pipeline again")
    if is_model and not any(folder.glob("*.safetensors")):
        pickled = sorted(one.name for one in folder.iterdir() if one.suffix in PICKLES)
        found = f"pickled weights only ({pickled[0]}), which can run code" if pickled else "none"
        raise GatesError(f"{folder} must hold weights as .safetensors, found {found}")


def _with_gguf(path: Path, components: str | Path | None, dtype: torch.dtype) -> Any:
    if components is None:
        raise GatesError(
            f"{path.name} is a transformer alone: give components=, a folder of a FluxPipeline"
        )
    folder = Path(components)
    kind, _ = _checked_index(folder, {"transformer"})
    if kind != "FluxPipeline":
        raise GatesError(f"{path.name} needs the parts of a FluxPipeline, {folder} is a {kind}")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise GatesError(f"{path} cannot be read: {error.strerror}") from error
    if magic != b"GGUF":
        raise GatesError(f"{path} is no GGUF file: it begins with {magic!r}")
    transformer = read_gguf(path, folder / "transformer", dtype)
    return _from_folder(folder, dtype, transformer=transformer)


def read_gguf(path: Path, config: Path, dtype: torch.dtype) -> FluxTransformer2DModel:
    """Read the transformer of FLUX from a GGUF file; its layers stay quantized.

    Args:
        path: The file, in the names of Black Forest Labs or diffusers.
        config: Folder of the transformer's ``config.json``.
        dtype: To compute in.

    Raises:
        GatesError: The file is damaged or of another model.
        MissingExtraError: A package is missing.
    """
    try:
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtraError("diffusion", error.name or "gguf") from error
    with _one_line(path):
        model = FluxTransformer2DModel.from_single_file(
            str(path),
            config=str(config),
            quantization_config=GGUFQuantizationConfig(compute_dtype=dtype),
            dtype=dtype,
            local_files_only=True,
        )
    if lacking := [name for name, tensor in model.named_parameters() if tensor.is_meta]:
        raise GatesError(
            f"{path.name} lacks {len(lacking)} tensors of the model that {config} describes, such"
            f" as {lacking[0]}: give components of the same model"
        )
    return model


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Turn what a library says about files into one line."""
    try:
        yield
    except (
        OSError, SafetensorError, RuntimeError, ValueError, TypeError, LookupError, AttributeError,
        ImportError, EOFError,
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split())[:SHOWN]
        raise GatesError(
            f"{path} cannot be loaded ({type(error).__name__}: {reason}): get it again"
        ) from error


def _accelerator() -> torch.device:
    return torch.accelerator.current_accelerator() or torch.device("cpu")
