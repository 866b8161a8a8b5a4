"""Rendered objects on disk in the layout of REAL-Colon, complete objects only, resumable."""

import csv
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from core_gates.errors import GatesError
from endoscopy.data.images import DEPTH_UNITS
from endoscopy.data.readers.real_colon import VocAnnotation, VocObject, write_voc
from endoscopy.renderer.camera import draw_track
from endoscopy.renderer.render import RenderedObject, render_object
from endoscopy.renderer.scene import SHAPES, RendererConfig, draw_scene
from harness.files.atomic import replacing, write_text

VIDEOS_PER_COHORT = 999
FOLDERS = ("annotations", "masks", "depths", "frames")
VIDEO_COLUMNS = (
    "unique_video_name", "age", "sex", "endoscope_brand", "fps", "num_frames", "num_lesions",
    "bbps",
)  # fmt: skip
LESION_COLUMNS = (
    "unique_object_id", "unique_video_name", "size [mm]", "site", "histology_extended",
    "histology_class", "gt_minor", "shape", "distance_mm", "exposure",
)  # fmt: skip


def video_name(index: int) -> str:
    """Return the name ``SSS-VVV`` of the video of an object."""
    cohort, number = divmod(index, VIDEOS_PER_COHORT)
    return f"{cohort + 1:03d}-{number + 1:03d}"


def render_dataset(
    root: str | os.PathLike[str], config: RendererConfig, num_objects: int, *, first: int = 0
) -> Iterator[int]:
    """Write objects as videos of one lesion; yield their number so far.

    ``{video}_frames`` (JPEG, quality 95, 4:4:4), ``{video}_annotations`` (Pascal VOC),
    ``{video}_masks`` (PNG, 0 and 255), ``{video}_depths`` (PNG, 16 bits, 1/256 mm, 0 where there is
    none; absent if the configuration asks for no depth), ``{video}_cameras.csv`` (poses), and for
    all ``video_info.csv``, ``lesion_info.csv`` and ``manifest.json``. An object is written whole or
    not at all. After a kill the same call continues where it stopped, and the bytes are those of an
    uninterrupted one.

    Args:
        root: Folder, empty, absent, or left by an earlier call with the same arguments.
        config: What is rendered.
        num_objects: How many objects.
        first: Index of the first object.

    Yields:
        The number of objects on disk, including those of earlier calls.

    Raises:
        GatesError: The folder holds something else.
        ValueError: ``num_objects`` is below 1 or ``first`` below 0.
    """
    claim_dataset(root, config, num_objects, first=first)
    yield from write_objects(root, config, range(first, first + num_objects))
    finish_dataset(root, config, num_objects, first=first)


def claim_dataset(
    root: str | os.PathLike[str], config: RendererConfig, num_objects: int, *, first: int = 0
) -> bool:
    """Claim a folder before objects are written to it; return whether it is complete already.

    For `write_objects` in several processes; arguments and errors of `render_dataset`.
    A folder that an earlier call with the same arguments claimed stays claimed.
    """
    if num_objects < 1 or first < 0:
        raise ValueError(
            f"num_objects must be at least 1 and first at least 0, got {num_objects} and {first}"
        )
    root, manifest = Path(root), _manifest(config, num_objects, first)
    path = root / "manifest.json"
    complete = False
    if path.exists():
        complete = _is_complete(path, manifest)
    elif root.exists() and any(root.iterdir()):
        raise GatesError(f"{root} holds other files, expected an empty folder; name another one")
    else:
        root.mkdir(parents=True, exist_ok=True)
        write_text(path, _json(manifest))
    for left in root.glob(".partial*"):
        shutil.rmtree(left)
    return complete


def write_objects(
    root: str | os.PathLike[str], config: RendererConfig, indices: Iterable[int]
) -> Iterator[int]:
    """Write missing objects and yield how many are on disk; processes may share a folder.

    Yields:
        The number of these objects on disk.
    """
    root = Path(root)
    for count, index in enumerate(indices, 1):
        video = video_name(index)
        if not (root / f"{video}_cameras.csv").exists():
            _write_object(root, video, render_object(config, index), config)
        yield count


def finish_dataset(
    root: str | os.PathLike[str], config: RendererConfig, num_objects: int, *, first: int = 0
) -> None:
    """Write the tables and mark all objects as complete in the manifest."""
    root = Path(root)
    videos, lesions = [], []
    for index in range(first, first + num_objects):
        scene = draw_scene(config, index)
        track = draw_track(config, index, scene)
        video = video_name(index)
        videos.append([video, "", "", track.brand.name, 10, config.frames, 1, ""])
        lesions.append([
            f"{video}_1", video, f"{scene.size:.4f}", "", "synthetic", "OTHER",
            f"{scene.size_minor:.4f}", SHAPES[scene.shape], f"{float(track.distance.median()):.4f}",
            config.exposure,
        ])  # fmt: skip
    write_text(root / "video_info.csv", _table(VIDEO_COLUMNS, videos))
    write_text(root / "lesion_info.csv", _table(LESION_COLUMNS, lesions))
    manifest = _manifest(config, num_objects, first)
    write_text(root / "manifest.json", _json(manifest | {"complete": True}))


def is_complete(
    root: str | os.PathLike[str], config: RendererConfig, num_objects: int, *, first: int = 0
) -> bool:
    """Return whether a folder holds all these objects.

    Raises:
        GatesError: It holds something else.
    """
    path = Path(root) / "manifest.json"
    return path.exists() and _is_complete(path, _manifest(config, num_objects, first))


def _manifest(config: RendererConfig, num_objects: int, first: int) -> dict[str, Any]:
    return {
        "scope": "synthetic",
        "renderer": 1,  # version
        "config": asdict(config),
        "num_objects": num_objects,
        "first": first,
        "depth_units_per_mm": DEPTH_UNITS,
        "depth": config.depth,
        "complete": False,
    }


def _is_complete(path: Path, manifest: dict[str, Any]) -> bool:
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise GatesError(f"{path} is no JSON: {error}; render to an empty folder") from error
    if not isinstance(written, dict) or written | {"complete": False} != manifest:
        raise GatesError(
            f"{path.parent} holds data rendered with other settings; name another folder or "
            "remove it"
        )
    return bool(written.get("complete"))


def _write_object(root: Path, video: str, item: RenderedObject, config: RendererConfig) -> None:
    """Write the folders of an object elsewhere, then move them; its camera file comes last."""
    aside = root / f".partial-{video}"
    folders = [name for name in FOLDERS if name != "depths" or config.depth != "none"]
    for name in folders:
        shutil.rmtree(root / f"{video}_{name}", ignore_errors=True)
        (aside / name).mkdir(parents=True)
    for t, image in enumerate(item.images.permute(0, 2, 3, 1).numpy()):
        stem = f"{video}_{t}"
        path = aside / "frames" / f"{stem}.jpg"
        Image.fromarray(image).save(path, quality=95, subsampling=0)
        mask = item.masks[t].numpy().astype(np.uint8) * 255
        Image.fromarray(mask).save(aside / "masks" / f"{stem}.png")
        if "depths" in folders:
            steps = (item.depths[t].double() * DEPTH_UNITS).round().clamp(0, 65535)
            Image.fromarray(steps.numpy().astype(np.uint16)).save(aside / "depths" / f"{stem}.png")
        write_voc(aside / "annotations" / f"{stem}.xml", _annotation(video, t, item, config))
    for name in folders:
        (aside / name).rename(root / f"{video}_{name}")
    aside.rmdir()
    with replacing(root / f"{video}_cameras.csv") as temporary:
        temporary.write_text(_cameras(item), encoding="utf-8")


def _annotation(video: str, t: int, item: RenderedObject, config: RendererConfig) -> VocAnnotation:
    xmin, ymin, xmax, ymax = (float(edge) for edge in item.boxes[t])
    number = item.number * config.frames + t
    lesion = VocObject("lesion", f"{video}_1", str(number), (xmin, xmax, ymin, ymax))
    side = float(config.side)
    return VocAnnotation(side, side, (lesion,), f"{video}_{t}.jpg", "SYNTHETIC")


def _cameras(item: RenderedObject) -> str:
    """Return the poses: position in mm and the axes of the camera in the scene."""
    axes = [f"{name}_{part}" for name in ("right", "down", "forward") for part in "xyz"]
    header = ["frame", "distance_mm", "gain", "x_mm", "y_mm", "z_mm", *axes]
    track, rows = item.track, []
    for t, gain in enumerate(item.gains.tolist()):
        pose = [*track.position[t].tolist(), *track.axes[t].t().flatten().tolist()]
        rows.append([t, *(f"{value:.6g}" for value in (float(track.distance[t]), gain, *pose))])
    return _table(header, rows)


def _table(header: Any, rows: list[list[Any]]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return stream.getvalue()


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, sort_keys=True) + "\n"
