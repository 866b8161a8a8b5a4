"""``gates diffusion inspect``: what is in a file of adapters, and who reads it."""

from __future__ import annotations

from pathlib import Path

from diffusion.lora_file import load_lora, verdicts
from harness.files import write_json


def inspect(
    paths: list[str],
    base: str | None = None,
    layers: bool = False,
    hashes: bool = True,
    json: str | None = None,
    overwrite_output: bool = False,
) -> None:
    """Say what PATHS hold, files of adapters or folders of them, and what other programs read.

    Args:
        paths: Filled in by the command line.
        base: Family of the model, flux or sd3, where the names fit both.
        layers: List every layer, with its rank and the norm of its change.
        hashes: Compute AutoV2 and AutoV3, for which the whole file is read.
        json: File to which everything is written as JSON, too.
        overwrite_output: Replace a file of that name.
    """
    found = {}
    for path in paths:
        bundle = load_lora(path, base, strict=False)
        assert bundle.report is not None
        found[path] = [v._asdict() for v in verdicts(bundle.report)]
        print(path, bundle.family, found[path])
    if json is not None:
        write_json(Path(json), found)
