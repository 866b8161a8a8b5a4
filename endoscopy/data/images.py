"""Frames, masks and depths: read at any bit depth, and moved together with their boxes."""

import os
import random
import re
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import albumentations as A
import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from core_gates.errors import GatesError

DEPTH_UNITS = 256.0
"""Steps of a stored depth per millimeter."""

MOST_PIXELS = 64_000_000
FAULTS = (SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
"""What decoders raise besides OSError."""


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Return a sort key under which ``a_2`` comes before ``a_10``."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts if p]


class ImageHeader(NamedTuple):
    """What the header of an image states: pixels, and bits per channel."""

    width: int
    height: int
    bits: int


def probe(path: str | os.PathLike[str]) -> ImageHeader:
    """Read the header, and check at the end of the file that the image is whole.

    This finds missing, foreign and truncated files at a hundredth of the cost of decoding, but no
    damage in the middle.

    Raises:
        GatesError: The image cannot be read.
    """
    path = Path(path)
    with _one_line(path), path.open("rb") as stream:
        head = stream.read(32)
        stream.seek(0, os.SEEK_END)
        stream.seek(max(0, stream.tell() - 1024))
        tail = stream.read()
        stream.seek(0)
        with Image.open(stream) as image:
            width, height, mode, kind = *image.size, image.mode, image.format
    if width * height > MOST_PIXELS:
        raise GatesError(f"{path} has {width} x {height} pixels, more than any frame; remove it")
    ends = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
    if kind in ends and ends[kind] not in tail:
        raise GatesError(f"{path} is truncated; copy it again")
    deep = 16 if mode.startswith("I") else 8
    return ImageHeader(width, height, head[24] if kind == "PNG" else deep)


def read_rgb(path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """Decode a frame.

    Returns:
        (H,W,3) uint8. Gray becomes three equal channels, 16 bits are scaled to 8, transparency is
        ignored.

    Raises:
        GatesError: The image cannot be read to its end.
    """
    return rgb_of(_decode(path))


def rgb_of(image: Image.Image) -> NDArray[np.uint8]:
    """Return the pixels (H,W,3) uint8 of a decoded image, as `read_rgb` does."""
    if image.mode.startswith("I"):
        gray = (np.asarray(image, dtype=np.uint32) // 257).astype(np.uint8)
        return np.repeat(gray[..., None], 3, axis=2)
    return np.array(image.convert("RGB"))  # torch expects writable memory


def read_mask(path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """Decode a mask.

    Returns:
        (H,W) uint8, 1 on the polyp: above half of the range of the format, or not 0 where the
        largest value is 1.

    Raises:
        GatesError: The image cannot be read to its end.
    """
    image = _decode(path)
    wide = image.mode.startswith("I")
    values = np.asarray(image if wide else image.convert("L"))
    middle = 0 if values.max(initial=0) <= 1 else 32767 if wide else 127
    return (values > middle).astype(np.uint8)


def read_depth(path: str | os.PathLike[str]) -> NDArray[np.float32]:
    """Decode a metric depth.

    Returns:
        (H,W) float32 in millimeters, 0 where the depth is unknown.

    Raises:
        GatesError: The image cannot be read, or has not one channel of 16 bits.
    """
    image = _decode(path)
    if not image.mode.startswith("I"):
        raise GatesError(
            f"{path} holds {image.mode}, expected one channel of 16 bits in 1/256 mm; write it so"
        )
    return np.asarray(image, dtype=np.float32) / np.float32(DEPTH_UNITS)


def _decode(path: str | os.PathLike[str]) -> Image.Image:
    path = Path(path)
    with _one_line(path), path.open("rb") as stream:
        image = Image.open(stream)
        if image.size[0] * image.size[1] > MOST_PIXELS:
            raise GatesError(f"{path} has {image.size[0]} x {image.size[1]} pixels; remove it")
        image.load()
        return image


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Turn any error of a decoder into one line that names the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (OSError, *FAULTS) as error:
        what = getattr(error, "strerror", None) or str(error).partition("\n")[0] or "damaged"
        raise GatesError(f"{path} cannot be read: {what}; copy it again") from error


os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it accesses the network when imported

Augmentation = Literal["published", "dihedral", "cifar", "none"]
KEEPS_SCALE = (
    A.Resize,
    A.Rotate,
    A.RandomRotate90,
    A.HorizontalFlip,
    A.VerticalFlip,
    A.Transpose,
    A.D4,
    A.SquareSymmetry,
    A.Pad,
    A.PadIfNeeded,
    A.NoOp,
    A.CoarseDropout,
    A.GridDropout,
)
"""Geometric transforms that every policy allows; those of colors alone are always allowed."""


class Frame(NamedTuple):
    """One frame with its targets.

    Attributes:
        image: (H,W,3) uint8, or float32 in [0, 1] after a pipeline that changes colors.
        box: xmin, ymin, xmax, ymax in pixels, edges not centers.
        mask: (H,W) uint8, 1 on the polyp; None without one.
        depth: (H,W) float32 in mm, 0 where unknown; None without one.
    """

    image: NDArray[Any]
    box: tuple[float, float, float, float]
    mask: NDArray[np.uint8] | None = None
    depth: NDArray[np.float32] | None = None


class Pipeline:
    """A Compose whose result depends on the frame and the keys it is called with alone.

    Args:
        steps: Transforms of albumentations, in order.
        scale_changes: ``refuse`` those that change how large a polyp appears, since its size in mm
            would no longer be right; ``allow`` them for tasks without a size.

    Raises:
        ValueError: A step changes the scale, or the policy is unknown.
    """

    def __init__(
        self,
        steps: Sequence[A.BasicTransform | A.BaseCompose],
        scale_changes: Literal["refuse", "allow"] = "refuse",
    ) -> None:
        if scale_changes not in ("refuse", "allow"):
            raise ValueError(f"scale_changes must be refuse or allow, got {scale_changes!r}")
        if scale_changes == "refuse":
            refuse_scale_changes(steps)
        self.compose = A.Compose(
            list(steps),
            bbox_params=A.BboxParams(
                "pascal_voc", label_fields=["labels"], clip=True, check_each_transform=False
            ),
            additional_targets={"depth": "mask"},
        )

    def __call__(self, frame: Frame, *keys: int) -> Frame:
        """Transform a frame by random numbers that depend on ``keys`` alone.

        Returns:
            The new frame; its box has no area if the polyp left the frame.
        """
        generator = np.random.default_rng(keys)
        self.compose.set_random_state(generator, random.Random(int(generator.integers(2**63))))
        targets: dict[str, Any] = {"image": frame.image, "bboxes": [frame.box], "labels": [0]}
        if frame.mask is not None:
            targets["mask"] = frame.mask
        if frame.depth is not None:
            targets["depth"] = frame.depth
        moved = self.compose(**targets)
        boxes = np.asarray(moved["bboxes"], dtype=np.float64).reshape(-1, 4)
        xmin, ymin, xmax, ymax = (float(v) for v in boxes[0]) if len(boxes) else (0.0,) * 4
        return Frame(
            moved["image"], (xmin, ymin, xmax, ymax), moved.get("mask"), moved.get("depth")
        )


def resize_frame(frame: Frame, size: int) -> Frame:
    """Return a frame of (size, size) pixels, the aspect not kept; what pipelines begin with.

    Frames are averaged where they shrink and bilinear where they grow; masks and depths take the
    nearest pixel.
    """
    height, width = frame.image.shape[:2]
    if (height, width) == (size, size):
        return frame
    method = cv2.INTER_AREA if size < height or size < width else cv2.INTER_LINEAR
    x, y = size / width, size / height
    xmin, ymin, xmax, ymax = frame.box
    targets: list[Any] = [
        None
        if channel is None
        else cv2.resize(channel, (size, size), interpolation=cv2.INTER_NEAREST)
        for channel in (frame.mask, frame.depth)
    ]
    return Frame(
        cv2.resize(frame.image, (size, size), interpolation=method),
        (xmin * x, ymin * y, xmax * x, ymax * y),
        *targets,
    )


def resizing(size: int) -> A.Resize:
    """Return the step that does in a pipeline what `resize_frame` does."""
    return A.Resize(size, size, interpolation=cv2.INTER_LINEAR, area_for_downscale="image")


def train_pipeline(size: int, recipe: Augmentation = "published") -> Pipeline:
    """Return the pipeline of a recipe; ``streams.normalize`` comes after it.

    - ``published`` (arXiv 2407.04400, code): rotation up to 30 degrees, flips, color jitter .15,
      .15, .15, hue .01, noise of .01; boxes turn with the ellipse they enclose, so that they do
      not grow;
    - ``dihedral``: one of the eight symmetries of the square, no change of color or brightness,
      which carry the distance;
    - ``cifar``: a flip, color jitter .1, .1, .1, hue .008, noise of .002, for small photographs;
    - ``none``: as in evaluation.

    Args:
        size: Side length in pixels.
        recipe: One of the above.

    Raises:
        GatesError: The recipe is unknown.
    """
    flips = [A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5)]
    rotation = A.Rotate((-30, 30), rotate_method="ellipse", p=1.0)
    recipes = {
        "published": [rotation, *flips, *_colors(0.15, 0.01, 0.01)],
        "dihedral": [A.SquareSymmetry(p=1.0)],
        "cifar": [flips[0], *_colors(0.1, 0.008, 0.002)],
        "none": [],
    }
    if recipe not in recipes:
        raise GatesError(f"recipe {recipe!r} is unknown: choose one of {', '.join(recipes)}")
    return Pipeline([resizing(size), *recipes[recipe]])


def refuse_scale_changes(steps: Sequence[Any]) -> None:
    """Raise ValueError for the first transform that may change how large things appear."""
    for step in steps:
        if isinstance(step, A.BaseCompose):
            refuse_scale_changes(step.transforms)
        elif isinstance(step, A.DualTransform) and not (
            isinstance(step, KEEPS_SCALE) or _is_isometric(step)
        ):
            raise ValueError(
                f"{type(step).__name__} may change the scale, which makes sizes in mm wrong; leave "
                "it out, or allow scale changes where no size is learned"
            )


def _is_isometric(step: Any) -> bool:
    """Whether an affine step only turns and moves."""
    if not isinstance(step, A.Affine):  # ShiftScaleRotate is one
        return False
    scales = np.asarray([step.scale[axis] for axis in ("x", "y")], dtype=float)
    shears = np.asarray([step.shear[axis] for axis in ("x", "y")], dtype=float)
    return bool((scales == 1.0).all() and (shears == 0.0).all() and not step.fit_output)


def _colors(jitter: float, hue: float, noise: float) -> list[A.BasicTransform]:
    around = (1.0 - jitter, 1.0 + jitter)
    return [
        A.ToFloat(255.0),
        A.ColorJitter(around, around, around, (-hue, hue), p=1.0),
        A.GaussNoise(std_range=(noise, noise), p=1.0),
    ]
