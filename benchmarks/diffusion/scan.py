"""A second scan of 10⁴ unchanged files, against the first."""

import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.registry import Call, Comparison, Load

FILES, FIRST = 10_000, 500
"""Files of the second scan and of the first, whose times are given per file."""

BAR = 0.1


def rescan() -> Comparison:
    """Compare what a file costs that is unchanged with what a new one costs."""
    return Comparison(
        name=f"scan of {FILES} files",
        op="library_scan",
        build=_variants,
        baseline="first scan",
        bars={"unchanged": BAR},
        units={"first scan": FIRST, "unchanged": FILES},
        unit="file",
    )


def write_adapter(path: Path, seed: int = 0, layers: int = 3) -> None:
    """Write a random file with the names of kohya, of layers of width 16."""
    draw, tensors = torch.Generator().manual_seed(seed), {}
    for number in range(layers):
        name = f"lora_unet_double_blocks_{number}_img_attn_proj"
        tensors[f"{name}.lora_down.weight"] = torch.randn(2, 16, generator=draw)
        tensors[f"{name}.lora_up.weight"] = torch.randn(16, 2, generator=draw)
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    save_file(tensors, path)


def _variants(load: Load) -> Mapping[str, Call]:
    folder = tempfile.TemporaryDirectory()
    root, few = Path(folder.name) / "many", Path(folder.name) / "few"
    for place, number in ((root, FILES), (few, FIRST)):
        place.mkdir()
        for seed in range(number):
            write_adapter(place / f"{seed}.safetensors", seed)
    kind = load("diffusion.library").LoraLibrary
    library = kind(root)
    library.scan()

    def first() -> object:
        index = Path(folder.name) / "index"
        with kind(few, index=index) as new:
            found = new.scan()
        shutil.rmtree(index)
        return found

    def again() -> object:
        return library.scan()

    def end() -> None:
        library.close()
        folder.cleanup()

    weakref.finalize(again, end)
    return {"first scan": first, "unchanged": again}
