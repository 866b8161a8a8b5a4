"""Reading a frame from the cache against decoding and resizing it, before augmentation.

The frames have the size of SUN's, 1240 x 1080, JPEG quality 95 with halved colors, and the texture
of a blurred field with fine grain. The cache holds 384 x 384 pixels and is warm: its pages are in
memory, as they are from the second epoch on.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.registry import Call, Comparison, Load

WIDTH, HEIGHT, SIZE = 1240, 1080, 384
FRAMES = 24
BARS = {"cache, raw": 1 / 10}
READS = {"decode + resize": 4, "cache, raw": FRAMES, "cache, jpeg": FRAMES}


def cached_read() -> Comparison:
    """Return the read of a frame from both kinds of cache; the raw one may take a tenth."""

    def build(load: Load) -> Mapping[str, Call]:
        folder = tempfile.TemporaryDirectory(prefix="gates-cache-")
        root = Path(folder.name)
        table = _table(load, root)
        reader = load("endoscopy.data.frame_cache").FrameReader(table, SIZE)
        build_cache = load("endoscopy.data.frame_cache").FrameCache
        sources: dict[str, Any] = {"decode + resize": reader}
        for form in ("raw", "jpeg"):
            cache = build_cache(reader, range(FRAMES), root, form)
            cache.build()
            sources[f"cache, {form}"] = cache
        return {name: _read(source, READS[name], folder) for name, source in sources.items()}

    return Comparison(
        name=f"frame of {WIDTH} x {HEIGHT} to {SIZE} px",
        op="frame_cache",
        build=build,
        baseline="decode + resize",
        bars=BARS,
        units={name: float(count) for name, count in READS.items()},
        unit="frame",
        rate="frames/s",
    )


def _read(source: Any, count: int, folder: object) -> Call:
    """Read ``count`` frames; the folder lives as long as the call."""
    kept = SimpleNamespace(folder=folder)

    def call() -> object:
        assert kept.folder is not None
        return [source.read(row).image[0, 0, 0] for row in range(count)]

    return call


def _table(load: Load, root: Path) -> Any:
    import pandas as pd

    generator = np.random.default_rng(0)
    rows = []
    for number in range(FRAMES):
        coarse = generator.integers(40, 220, (12, 14, 3), dtype=np.uint8)
        field = np.asarray(
            Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        )
        grain = generator.normal(0.0, 3.0, (HEIGHT, WIDTH, 1))
        path = root / f"{number}.jpg"
        Image.fromarray((field + grain).clip(0, 255).astype(np.uint8)).save(path, quality=95)
        rows.append(
            {
                "database": "SUN",
                "unique_id": str(number),
                "frame_id": 0,
                "bbox_xmin": 100.0,
                "bbox_xmax": 300.0,
                "bbox_ymin": 100.0,
                "bbox_ymax": 300.0,
                "width": WIDTH,
                "height": HEIGHT,
                "frame_path": str(path),
                "gt": 5.0,
            }
        )
    return load("endoscopy.data.frame_table").FrameTable(pd.DataFrame(rows))
