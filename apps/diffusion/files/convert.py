"""``gates diffusion convert``: an adapter in the format of another program."""

from __future__ import annotations

from pathlib import Path

from diffusion.lora_file import load_lora, save_lora, shrink_bundle
from harness.files import require_apart, require_free


def convert(
    file: str,
    output: str,
    to: str = "diffusers",
    rank: int | None = None,
    energy: float | None = None,
    dtype: str | None = None,
    lenient: bool = False,
    overwrite_output: bool = False,
) -> None:
    """Write FILE as OUTPUT in the format of another program.

    Args:
        file: Filled in by the command line.
        output: Filled in by the command line.
        to: Format, one of diffusers, peft, kohya, comfyui.
        rank: Largest rank of a layer; layers above are shrunk to it.
        energy: Fraction of the squared norm of each change that is kept at least.
        dtype: Numbers of the output: float32, float16 or bfloat16; those of the file by default.
        lenient: Leave out what cannot be used instead of refusing the file.
        overwrite_output: Replace an output that exists.
    """
    source, target = Path(file), Path(output)
    require_free(target, overwrite=overwrite_output)
    require_apart(target, [source], "OUTPUT")
    bundle = load_lora(source, strict=not lenient)
    if rank is not None or energy is not None:
        bundle, _ = shrink_bundle(bundle, rank, energy)
    print(save_lora(bundle, target, to, dtype))
