"""``gates diffusion merge``: one adapter of several."""

from __future__ import annotations

from core_gates.errors import GatesError


def merge(
    files: list[str],
    output: str,
    method: str = "sum",
    weights: str | None = None,
    to: str = "diffusers",
    overwrite_output: bool = False,
) -> None:
    """Make one adapter of FILES.

    Args:
        files: Filled in by the command line.
        output: File or folder of the merged adapter.
        method: How they are merged: sum, mean or weighted.
        weights: Strengths by the name of a file, such as a:0.8,b:0.5.
        to: Format, one of diffusers, peft, kohya, comfyui.
        overwrite_output: Replace an output that exists.
    """
    raise GatesError(f"the method {method} is not there yet")
