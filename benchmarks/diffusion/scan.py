"""A second scan of 10⁴ unchanged files, against the first."""

import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path

from benchmarks.registry import Call, Comparison, Load
from diffusion.evaluation.parity.files.writer import write

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


def _variants(load: Load) -> Mapping[str, Call]:
    folder = tempfile.TemporaryDirectory()
    root, few = Path(folder.name) / "many", Path(folder.name) / "few"
    for place, number in ((root, FILES), (few, FIRST)):
        place.mkdir()
        for seed in range(number):
            file = write("bfl", "lora_down", "lora_unet_", layers=3, seed=seed)
            file.save(place / f"{seed}.safetensors")
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
