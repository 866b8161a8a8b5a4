"""Opening a Zarr, NetCDF or GRIB store at a path or URL, with errors that name the fault."""

import difflib
import gc
import json
import os
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import PurePosixPath
from typing import Any

import fsspec
import xarray as xr
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from core_gates.errors import GatesError

ZARR_MARKERS = (".zmetadata", "zarr.json", ".zgroup")
ENGINES = {
    b"\x89HDF": "h5netcdf",
    b"CDF\x01": "scipy",
    b"CDF\x02": "scipy",
    b"GRIB": "cfgrib",
}
FOREIGN = {
    b"CDF\x05": "NetCDF in the CDF-5 format: convert it with 'nccopy -k nc4'",
    b"PK\x03\x04": "a zip archive: unpack it",
    b"\x1f\x8b": "compressed with gzip: unpack it with gunzip",
    b"BUFR": "a BUFR file of observations, expected gridded fields: convert it",
}


CFGRIB_OPTIONS = {"indexpath": "", "errors": "raise"}  # no index file, no message left out


def open_store(
    source: str | os.PathLike[str], storage_options: dict[str, Any] | None = None
) -> xr.Dataset:
    """Open a store lazily, as it is; only coordinates are read.

    Args:
        source: Path or fsspec URL of a Zarr group (format 2 or 3, consolidated or not), a NetCDF
            file (3 or 4) or, where cfgrib is installed, a GRIB file.
        storage_options: Passed to the file system of a URL, such as ``{"token": "anon"}``.

    Raises:
        GatesError: If there is no store, or it is damaged, or a package is missing to read it.
    """
    url = os.fspath(source)
    try:
        filesystem, path = fsspec.core.url_to_fs(url, **(storage_options or {}))
    except (ImportError, ValueError) as error:
        raise GatesError(f"{url}: cannot be reached: {_first_line(error)}") from error
    try:
        if any(filesystem.exists(f"{path}/{marker}") for marker in (*ZARR_MARKERS, ".zarray")):
            return _open_zarr(filesystem, path, url, storage_options)
        _require(filesystem, path, url)
        return _open_file(filesystem, path, url)
    except PermissionError as error:
        raise GatesError(f"{url}: permission denied; give yourself read access") from error


@contextmanager
def naming(source: str | os.PathLike[str]) -> Iterator[None]:
    """Put the name of a store before the message of a `GatesError` that does not know it."""
    try:
        yield
    except GatesError as error:
        raise GatesError(f"{os.fspath(source)}: {error}") from error


def _require(filesystem: AbstractFileSystem, path: str, url: str) -> None:
    """Raise unless a file lies at the path."""
    if not filesystem.exists(path):
        parent, name = str(PurePosixPath(path).parent), PurePosixPath(path).name
        siblings = filesystem.ls(parent, detail=False) if filesystem.isdir(parent) else []
        names = [PurePosixPath(sibling).name for sibling in siblings]
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]}?" if close else "check the path"
        raise GatesError(f"{url}: does not exist; {hint}")
    if filesystem.isdir(path):
        raise GatesError(
            f"{url}: is a directory without {', '.join(ZARR_MARKERS)}, expected a Zarr group or a "
            "NetCDF file; name the store inside it"
        )


def _open_zarr(
    filesystem: AbstractFileSystem, path: str, url: str, storage_options: dict[str, Any] | None
) -> xr.Dataset:
    try:
        consolidated = _is_consolidated(filesystem, path, url)
        dataset: xr.Dataset = xr.open_zarr(
            url,
            chunks=None,
            consolidated=consolidated,
            decode_timedelta=True,
            storage_options=storage_options,
        )
        return dataset
    except json.JSONDecodeError as error:
        raise GatesError(f"{url}: its Zarr metadata is not JSON; copy the store again") from error
    except Exception as error:  # zarr and its codecs raise errors of many types
        raise GatesError(
            f"{url}: cannot be read as Zarr: {_first_line(error)}; repair it or write it again"
        ) from error


def _is_consolidated(filesystem: AbstractFileSystem, path: str, url: str) -> bool:
    """Return whether the metadata of all arrays lie in one place."""
    if filesystem.exists(f"{path}/.zmetadata"):
        return True
    if filesystem.exists(f"{path}/zarr.json"):
        metadata = json.loads(filesystem.cat_file(f"{path}/zarr.json"))
        if metadata.get("node_type") == "group":
            return metadata.get("consolidated_metadata") is not None
    elif filesystem.exists(f"{path}/.zgroup"):
        return False
    raise GatesError(
        f"{url}: is a single Zarr array, expected a group with coordinates; name its parent"
    )


def _open_file(filesystem: AbstractFileSystem, path: str, url: str) -> xr.Dataset:
    head = filesystem.cat_file(path, end=8)
    for magic, what in FOREIGN.items():
        if head.startswith(magic):
            raise GatesError(f"{url}: is {what}")
    engine = next((name for magic, name in ENGINES.items() if head.startswith(magic)), None)
    if engine is None:
        size = filesystem.size(path)
        raise GatesError(
            f"{url}: is neither Zarr, NetCDF nor GRIB ({size} bytes, starting {head!r}); "
            + ("download it again" if size == 0 else "name another file or convert it")
        )
    if engine == "cfgrib" and find_spec("cfgrib") is None:
        raise GatesError(f"{url}: is GRIB, which needs cfgrib: pip install cfgrib")
    local = isinstance(filesystem, LocalFileSystem)
    try:
        return xr.open_dataset(
            path if local else filesystem.open(path),
            engine=engine,
            decode_timedelta=True,
            backend_kwargs=CFGRIB_OPTIONS if engine == "cfgrib" else None,
        )
    except Exception as error:  # each reader has its own types of errors
        _release(error)
        damaged = isinstance(error, OSError) or "reshape" in str(error)  # a NetCDF-3 array cut off
        fix = (
            "the file is truncated or damaged, download it again" if damaged else "repair the file"
        )
        if engine == "cfgrib":
            fix = "if it mixes kinds of levels or times, split it with grib_copy"
        raise GatesError(f"{url}: cannot be read: {_first_line(error)}; {fix}") from error


def _release(error: BaseException) -> None:
    """Close what a failed reader left open; scipy warns about a memory map that it has to drop."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traceback.clear_frames(error.__traceback__)
        gc.collect()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().strip("'\"").splitlines()
    return lines[0] if lines else type(error).__name__
