"""Fake colonoscopies in the layout of REAL-Colon, tiny: two brands, several lesions a frame."""

import csv
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 64, 48
LESIONS = {
    "001-001_1": ("6", "sigmoid", "AD"),
    "001-001_2": ("2.5", "rectum", "HP"),
    "001-002_1": ("12", "cecum", "SSL"),
    "002-001_1": ("4", "ascending", "AD"),
}
BRANDS = {"001-001": "Olympus", "001-002": "Fuji", "002-001": "Olympus"}
XML = """<annotation>
	<folder>{video}_frames</folder>
	<filename>{stem}.jpg</filename>
	<source>
		<database>cosmo</database>
		<release>v1.0_20230228</release>
	</source>
	<size>
		<width>{width}</width>
		<height>{height}</height>
		<depth>3</depth>
	</size>
{objects}</annotation>
"""
OBJECT = """	<object>
		<name>lesion</name>
		<unique_id>{name}</unique_id>
		<box_id>{number}</box_id>
		<bndbox>
			<xmin>{xmin}</xmin>
			<xmax>{xmax}</xmax>
			<ymin>{ymin}</ymin>
			<ymax>{ymax}</ymax>
		</bndbox>
	</object>
"""


def box(name: str, frame: int) -> tuple[float, float, float, float]:
    """Return xmin, xmax, ymin, ymax of a lesion, inside the frame and moving."""
    start = 4 + 20 * (int(name[-1]) - 1) + frame % 3
    return start, start + 14, 8 + frame % 5, 28 + frame % 5


def image(video: str, frame: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """Return a smooth frame (H,W,3) uint8 that no other frame equals."""
    y, x = np.mgrid[:height, :width] / 8.0
    phase = frame + 7 * sum(map(ord, video))
    channels = [np.sin(x + phase + c) * np.cos(y - c) for c in range(3)]
    return (127 + 100 * np.stack(channels, -1)).astype(np.uint8)


def write_image(path: Path, pixels: np.ndarray) -> None:
    """Write a frame as REAL-Colon's are, or as PNG by the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=95)


def write_annotation(
    root: Path, video: str, frame: int, boxes: dict[str, tuple], width=WIDTH, height=HEIGHT
) -> Path:
    """Write the annotation of a frame; no boxes on a negative one."""
    stem = f"{video}_{frame}"
    objects = ""
    for number, (name, (xmin, xmax, ymin, ymax)) in enumerate(boxes.items()):
        corners = {"xmin": xmin, "xmax": xmax, "ymin": ymin, "ymax": ymax}
        objects += OBJECT.format(name=name, number=number, **corners)
    path = root / f"{video}_annotations" / f"{stem}.xml"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = XML.format(video=video, stem=stem, width=width, height=height, objects=objects)
    path.write_text(text, encoding="utf-8")
    return path


def write_csv(path: Path, rows: list[dict]) -> None:
    """Write a table with the columns of its first row."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def lesion_rows(lesions=None) -> list[dict]:
    """Return the rows of lesion_info.csv."""
    return [
        {
            "unique_object_id": name,
            "unique_video_name": name.partition("_")[0],
            "size [mm]": size,
            "site": site,
            "histology_extended": "",
            "histology_class": histology,
        }
        for name, (size, site, histology) in (lesions or LESIONS).items()
    ]


def official(root: Path, frames: int = 12, *, targets: bool = False) -> Path:
    """Write videos whose first frame is negative, with frame numbers 0 to ``frames`` - 1.

    Args:
        root: New folder.
        frames: Frames of a video; above 10, so that names do not sort as numbers do.
        targets: Write masks and depths too, as rendered data has them.
    """
    root.mkdir(parents=True)
    write_csv(root / "lesion_info.csv", lesion_rows())
    videos = [
        {"unique_video_name": video, "endoscope_brand": brand, "num_frames": frames}
        for video, brand in BRANDS.items()
    ]
    write_csv(root / "video_info.csv", videos)
    for video in BRANDS:
        names = [name for name in LESIONS if name.startswith(video)]
        for frame in range(frames):
            boxes = {name: box(name, frame) for name in names} if frame else {}
            write_annotation(root, video, frame, boxes)
            stem = f"{video}_{frame}"
            write_image(root / f"{video}_frames" / f"{stem}.jpg", image(video, frame))
            if targets:
                write_targets(root, video, stem, boxes)
    return root


def write_targets(root: Path, video: str, stem: str, boxes: dict[str, tuple]) -> None:
    """Write a mask that fills the boxes and a depth of 10 mm, 5 mm in them."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    for xmin, xmax, ymin, ymax in boxes.values():
        mask[ymin:ymax, xmin:xmax] = 255
    write_image(root / f"{video}_masks" / f"{stem}.png", mask)
    depth = np.where(mask > 0, 5 * 256, 10 * 256).astype(np.uint16)
    write_image(root / f"{video}_depths" / f"{stem}.png", depth)
