"""``gates endoscopy prepare``: one table and one cache from the layouts that data sets come in."""

from __future__ import annotations

from pathlib import Path

from apps.files import write_json
from apps.ticker import ticking
from endoscopy.data.datamodule import PolypSizingDataModule
from endoscopy.metrics import TRUTH, count_on_cut_offs

TABLE, REPORT = "frames.parquet", "read_report.json"


def prepare_data(data: PolypSizingDataModule, folder: Path) -> Path:
    """Read and check everything, build the cache, and write the frame table.

    Prints what was read, left out and mended, the split, and the size of the cache before it is
    built.

    Args:
        data: Names sources, split and cache.
        folder: Where ``frames.parquet`` and ``read_report.json`` go.

    Returns:
        The frame table.
    """
    table = data.load()
    print("\n".join(data.report.lines()))
    sizes = table.objects["gt"].to_numpy(float)
    exact = ", ".join(f"{count} on {cut:g} mm" for cut, count in count_on_cut_offs(sizes).items())
    classes = TRUTH.classes(sizes)
    counts = ", ".join(f"{int((classes == k).sum())} {name}" for k, name in enumerate(CLASSES))
    print(f"{len(table)} frames of {len(sizes)} objects: {counts}; {exact} exactly")
    assert data.parts is not None
    codes = table.object_codes
    parts = [
        f"{name} {len(set(codes[rows]))} objects, {len(rows)} frames"
        for name, rows in data.parts._asdict().items()
    ]
    print(f"split {data.folds.name if data.folds else data.split_kind}: {'; '.join(parts)}")
    cache = data.plan_cache()
    if cache is not None and not cache.is_complete():
        print(cache.summary())
        with ticking("caching", len(cache)) as tick:
            found = cache.build(lambda *_: tick())
        if found.unreadable:
            print("\n".join(found.lines()))
    if cache is not None:
        print(cache.folder)
    write_json(folder / REPORT, data.report.to_dict())
    return table.write_parquet(folder / TABLE)


CLASSES = ("diminutive", "small", "large")
