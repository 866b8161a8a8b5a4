"""The drawings of OpenMoji, with captions, and of the same emoji by Noto and Twemoji."""

import csv
import zipfile
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from core_gates.errors import GatesError
from harness.files.digest import sha256, short_digest

IMAGES, CAPTIONS = "emoji32.npz", "captions.csv"
DRAWN = ("openmoji_color", "openmoji_black", "noto", "twemoji")
EXTRAS = ("extras-openmoji", "extras-unicode", "component")
"""Groups outside of the standard."""

SIZE = 32


class Drawings(NamedTuple):
    """Emoji of the Unicode standard, drawn in four ways, row by row.

    Attributes:
        hexcodes: Code points, such as ``1F600``.
        captions: English names.
        subgroups: Such as ``food-fruit``.
        images: ``openmoji_color``, ``openmoji_black``, ``noto``, ``twemoji`` -> (N, 32, 32, 3)
            uint8.
        whole: (N,) whether all four drawings exist.
        digest: 16 hexadecimal digits that distinguish the files.
    """

    hexcodes: np.ndarray
    captions: np.ndarray
    subgroups: np.ndarray
    images: dict[str, np.ndarray]
    whole: np.ndarray
    digest: str

    def __len__(self) -> int:
        return len(self.hexcodes)

    @classmethod
    def load(cls, folder: str | Path | None = None) -> Self:
        """Read the drawings.

        Args:
            folder: Of ``emoji32.npz`` and ``captions.csv``; those of the package if None.

        Raises:
            GatesError: A file is missing or damaged.
        """
        place = Path(str(files("diffusion.data") / "openmoji")) if folder is None else Path(folder)
        try:
            with (
                (place / IMAGES).open("rb") as images,
                np.load(images, allow_pickle=False) as arrays,
            ):
                found = {name: arrays[name] for name in arrays.files}
            with (place / CAPTIONS).open(encoding="utf-8", newline="") as stream:
                rows = list(csv.DictReader(stream))
            return cls._of(found, rows, place)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise GatesError(
                f"{place} holds no whole set of drawings ({type(error).__name__}: {error}): give a "
                f"folder with {IMAGES} and {CAPTIONS}, or none for those of the package"
            ) from error

    @classmethod
    def _of(cls, found: dict[str, np.ndarray], rows: list[dict[str, str]], place: Path) -> Self:
        hexcodes = found["hexcode"]
        if [row["hexcode"] for row in rows] != hexcodes.tolist():
            raise ValueError(f"the rows of {CAPTIONS} are not those of {IMAGES}")
        shape = (len(rows), SIZE, SIZE, 3)
        for name in DRAWN:
            if found[name].shape != shape or found[name].dtype != np.uint8:
                raise ValueError(f"{name} is {found[name].dtype} {found[name].shape}, not {shape}")
        kept = np.array([row["group"] not in EXTRAS for row in rows])
        return cls(
            hexcodes[kept],
            np.array([row["annotation"] for row in rows])[kept],
            np.array([row["subgroup"] for row in rows])[kept],
            {name: found[name][kept] for name in DRAWN},
            (found["noto_valid"] & found["twemoji_valid"])[kept],
            short_digest([sha256(place / name) for name in (IMAGES, CAPTIONS)]),
        )
