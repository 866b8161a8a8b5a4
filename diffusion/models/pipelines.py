"""Pipelines from local files, and images and captions as a model sees them."""

import json
from collections.abc import Iterator, Sequence
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
from torch import Tensor, nn

from core_gates.errors import GatesError, check_option
from diffusion.data.pictures import read_image
from diffusion.models.embedded_base import CONFIG, KIND, EmbeddedBase
from diffusion.models.text_encoders import TextStates

Offload = Literal["none", "model", "sequential", "group"]

INDEX = "model_index.json"
PIPELINES: dict[str, Any] = {
    "FluxPipeline": FluxPipeline,
    "StableDiffusion3Pipeline": StableDiffusion3Pipeline,
}
LIBRARIES = ("diffusers", "transformers")  # whose classes the parts of a pipeline may be of

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SHOWN = 160  # letters of a message of a library that are passed on


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
    device = device or torch.accelerator.current_accelerator() or "cpu"
    place(pipe, offload, torch.device(device))
    return LoadedPipeline(pipe, base)


def place(pipe: Any, offload: Offload, device: torch.device) -> None:
    """Put a pipeline on a device, all of it or what is needed at a time.

    Args:
        pipe: A pipeline of diffusers.
        offload: As of `load_pipeline`.
        device: Where to compute.

    Raises:
        GatesError: Layers are to be moved to the processor, where they are.
    """
    if offload == "sequential" and device.type == "cpu":
        raise GatesError("offload='sequential' needs an accelerator, found none: use 'none'")
    {
        "none": lambda: pipe.to(device),
        "model": lambda: pipe.enable_model_cpu_offload(device=device),
        "sequential": lambda: pipe.enable_sequential_cpu_offload(device=device),
        "group": lambda: pipe.enable_group_offload(onload_device=device, offload_type="leaf_level"),
    }[offload]()


def _is_embedded(path: Path) -> bool:
    """Return whether a folder describes an embedded base; a whole pipeline does not."""
    if not (path / CONFIG).is_file() or (path / INDEX).is_file():
        return False
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True  # loading it says what is wrong
    return isinstance(config, dict) and config.get("kind") == KIND


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
        folder = path / name
        if not folder.is_dir():
            raise GatesError(f"{folder} is missing: get the pipeline again")
        is_model = "tokenizer" not in name and name != "scheduler"
        if is_model and not any(folder.glob("*.safetensors")):
            pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
            held = f"pickled weights only ({pickled[0]}), which can run code" if pickled else "none"
            raise GatesError(f"{folder} must hold weights as .safetensors, found {held}")
    return str(kind), absent


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
    import accelerate  # noqa: F401
    import gguf  # noqa: F401

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


BATCH = 8  # images, or captions, that are encoded at a time

FAMILIES = {"FluxPipeline": "flux", "StableDiffusion3Pipeline": "sd3"}  # pipeline -> family


class PipelineCodec:
    """What encodes images and captions for a ``FluxPipeline`` or ``StableDiffusion3Pipeline``.

    Args:
        pipeline: With text encoders and autoencoder, which `release` gives up.
        size: Side of images in pixels.

    Raises:
        GatesError: It is another pipeline, lacks a part, or cannot make images of this size.
    """

    def __init__(self, pipeline: Any, size: int = 1024) -> None:
        name = type(pipeline).__name__
        if name not in FAMILIES:
            raise GatesError(f"{name} is no pipeline of {' or '.join(FAMILIES)}")
        lacking = [
            part for part in ("vae", "text_encoder") if getattr(pipeline, part, None) is None
        ]
        if lacking:
            raise GatesError(f"the pipeline has no {lacking[0]}: give one with all its parts")
        step = pipeline.vae_scale_factor * 2
        if size < step or size % step:
            raise GatesError(f"images of {size} pixels do not suit {name}: a multiple of {step}")
        self.pipeline, self.family, self.size = pipeline, FAMILIES[name], size
        self.shift = 1.0
        self.transformer: nn.Module = pipeline.transformer

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        """Return latents (B, C, h, w), scaled as the transformer sees them, in float32."""
        vae = self.pipeline.vae
        latents = vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mode()
        shifted = latents - (vae.config.shift_factor or 0)
        return (shifted * vae.config.scaling_factor).float().cpu()

    @torch.no_grad()
    def states(self, captions: Sequence[str]) -> TextStates:
        """Return the states of captions, in float32."""
        starts = range(0, len(captions), BATCH)
        parts = zip(*(self._states(list(captions[i : i + BATCH])) for i in starts), strict=True)
        return TextStates(*map(torch.cat, parts))

    def _states(self, given: list[str]) -> tuple[Tensor, Tensor]:
        if self.family == "flux":
            tokens, pooled, _ = self.pipeline.encode_prompt(given, given)
        else:
            tokens, _, pooled, _ = self.pipeline.encode_prompt(
                given, given, given, do_classifier_free_guidance=False
            )
        return tokens.float().cpu(), pooled.float().cpu()

    def release(self) -> None:
        """Give up what only encodes, so that its memory is free for the training."""
        for part in ("vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
            if hasattr(self.pipeline, part):
                setattr(self.pipeline, part, None)


Codec = EmbeddedBase | PipelineCodec
"""What encodes images and captions for a ``transformer``, whose ``shift`` is that of times."""


def load_codec(folder: str | Path, size: int | None = None) -> Codec:
    """Return the codec of a base, its transformer frozen and in the main memory.

    Args:
        folder: Of an embedded base, or of a ``FluxPipeline`` or ``StableDiffusion3Pipeline`` as
            diffusers saves it.
        size: Side of images in pixels; that of the embedded base, else 1024, if None.

    Raises:
        GatesError: There is no such base, or it makes no images of this size.
    """
    loaded = load_pipeline(folder, device="cpu")
    if loaded.base is None:
        return PipelineCodec(loaded.pipe, 1024 if size is None else size)
    if size not in (None, loaded.base.size):
        raise GatesError(f"{folder} makes images of {loaded.base.size} pixels, not of {size}")
    return loaded.base


def latents_of(codec: Codec, images: Sequence[Path]) -> Tensor:
    """Return the latents (N, C, h, w) of image files, of which few are in memory at a time.

    Raises:
        GatesError: A file is no image, damaged or too large.
    """
    return torch.cat(
        [
            codec.latents(torch.stack([read_image(path, codec.size) for path in part]))
            for part in (images[start : start + BATCH] for start in range(0, len(images), BATCH))
        ]
    )
