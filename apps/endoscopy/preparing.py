"""``gates endoscopy prepare``: one table and one cache from the layouts of the data sets."""

from __future__ import annotations

from pathlib import Path

from core_gates.errors import GatesError
from endoscopy.data.datamodule import PolypSizingDataModule
from endoscopy.metrics import TRUTH, count_on_cut_offs
from harness.files.atomic import write_json
from harness.files.manifest import figshare_manifest, read_manifest, total_bytes
from harness.files.unpack import download_and_unpack
from harness.runs.ticker import ticking

REAL_COLON = 22202866  # article on figshare
TABLE, REPORT = "frames.parquet", "read_report.json"


def prepare_data(data: PolypSizingDataModule, folder: Path) -> Path:
    """Read and check everything, build the cache, and write the frame table.

    Prints what was read, left out and repaired, the split, and the size of the cache before it
    is built.

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


def download_real_colon(data: PolypSizingDataModule, folder: str, manifest: str | None) -> None:
    """Download and unpack REAL-Colon, the total size printed first, and let the data read it.

    Args:
        data: Of a configuration that reads REAL-Colon.
        folder: Where it goes.
        manifest: JSON list of files; figshare is asked where it is None.

    Raises:
        GatesError: The configuration reads something else, or the download fails.
    """
    if "real_colon" not in data.sources:
        raise GatesError(
            f"--download brings REAL-Colon, and the data are {', '.join(data.sources)}: take a "
            "configuration of REAL-Colon, such as real_colon"
        )
    files = figshare_manifest(REAL_COLON) if manifest is None else read_manifest(manifest)
    print(f"{len(files)} files of {total_bytes(files) / 1e9:.2f} GB into {folder}", flush=True)
    data.sources["real_colon"] = str(download_and_unpack(files, folder, tell=print))


CLASSES = ("diminutive", "small", "large")
