"""The model that adapters are for: its family, or its folder."""

from __future__ import annotations

from pathlib import Path

from core_gates.errors import GatesError
from diffusion.lora_file.family import FAMILIES, modules_in
from diffusion.lora_file.reading import Base


def base_of(text: str | None) -> Base | None:
    """Return what an option ``--base`` stands for.

    Args:
        text: A family, a folder of diffusers, or None.

    Raises:
        GatesError: It is neither.
    """
    if text is None or text in FAMILIES:
        return text
    if Path(text).is_dir():
        return modules_in(Path(text))
    families = " or ".join(FAMILIES)
    raise GatesError(f"--base is {text!r}, expected {families}, or a folder of diffusers")
