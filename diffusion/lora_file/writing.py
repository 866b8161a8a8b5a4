"""Write an adapter in a format of choice: atomically, and with the same bytes every time."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from core_gates.errors import check_option
from diffusion.lora_file.bundle import LoraBundle
from diffusion.lora_file.config import CONFIG, WEIGHTS
from diffusion.lora_file.container import LIMITS, serialize
from diffusion.lora_file.container.text import listed
from diffusion.lora_file.errors import FormatError
from diffusion.lora_file.writers import FORMATS, Layout
from diffusion.lora_file.writers.layout import in_storage
from harness.files.atomic import replacing, write_bytes

_DOWN = (".lora_A.weight", ".lora_down.weight")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def save_lora(
    bundle: LoraBundle, path: str | Path, format: str = "diffusers", dtype: str | None = None
) -> Path:
    """Write an adapter.

    Args:
        bundle: The adapter.
        path: A ``.safetensors`` file; for ``peft`` a folder.
        format: ``diffusers``, ``peft``, ``kohya``, ``bfl`` or ``comfyui``.
        dtype: ``float32``, ``float16`` or ``bfloat16``, in which factors are rounded; by default
            that of the file that was read, and float32 where a value would change.

    Raises:
        FormatError: There is nothing to write, a value is not finite or too large, or the format
            has no way to store some layers; they are named.
        GatesError: The place cannot be written.
    """
    check_option("format", format, FORMATS, FormatError)
    if dtype is not None:
        check_option("dtype", dtype, DTYPES, FormatError)
    place = Path(path)
    if format != "peft" and place.suffix != ".safetensors":
        raise FormatError(f"{place.name} must end with .safetensors, as {format} is a single file")
    if not bundle.modules and not any(bundle.text_encoders.values()):
        raise FormatError("the adapter changes no layer; there is nothing to write")
    _check_ranks(bundle.ranks())
    layout = FORMATS[format](bundle)
    _check_ranks({n: t.shape[0] for n, t in layout.tensors.items() if n.endswith(_DOWN)})
    raw = _bytes(layout, bundle.storage if dtype is None else DTYPES[dtype], exact=dtype is None)
    if layout.config is None:
        return write_bytes(place, raw)
    with replacing(place) as folder:
        folder.mkdir()
        (folder / WEIGHTS).write_bytes(raw)
        text = json.dumps(layout.config, indent=2, sort_keys=True) + "\n"
        (folder / CONFIG).write_text(text, encoding="utf-8")
    return place


def _check_ranks(ranks: Mapping[str, int]) -> None:
    """Refuse ranks that no reader would take, before they are expanded.

    Raises:
        FormatError: They are named.
    """
    if high := sorted(name for name, rank in ranks.items() if rank > LIMITS.rank):
        raise FormatError(
            f"rank {ranks[high[0]]} of {listed(high)} is above {LIMITS.rank}; shrink the adapter "
            "to a rank first"
        )


def _bytes(layout: Layout, dtype: torch.dtype, *, exact: bool) -> bytes:
    """Return the bytes of the file of weights.

    Raises:
        FormatError: A value is not finite or too large for the dtype.
    """
    stored = {
        name: tensor if name in layout.exact else in_storage(tensor, dtype, exact)
        for name, tensor in layout.tensors.items()
    }
    for name, tensor in stored.items():
        if not torch.isfinite(layout.tensors[name]).all():
            raise FormatError(f"{name} holds NaN or infinity, which no program can use")
        if not torch.isfinite(tensor).all():
            raise FormatError(f"{name} holds values that are too large for {dtype}; use float32")
    return serialize(stored, layout.metadata)
