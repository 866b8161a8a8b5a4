"""Small photographs with classes, for the study of gates beyond endoscopy."""

from __future__ import annotations

import gzip
import os
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from core_gates.errors import GatesError

FASHION_FOLDER = "/usr/share/datasets/fashion-mnist"
FASHION_PACKAGE = "dataset-fashion-mnist"
_MAGIC = {1: 2049, 3: 2051}


class LabeledImages(NamedTuple):
    """Images of K classes in three disjoint parts.

    Attributes:
        train: (N,1,H,W) float32 in [0, 1] and (N,) int64 labels.
        validation: The same, to choose by.
        test: The same, to report on.
        num_classes: K.
    """

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    num_classes: int


def digits(seed: int = 0) -> LabeledImages:
    """Return the 1,797 handwritten digits of scikit-learn, 8 x 8, stratified 60/20/20 %."""
    data: Any = load_digits()
    images = (data.images / 16.0).astype(np.float32)
    rest, test = train_test_split(
        np.arange(len(images)), test_size=0.2, stratify=data.target, random_state=seed
    )
    train, validation = train_test_split(
        rest, test_size=0.25, stratify=data.target[rest], random_state=seed
    )
    first, second, third = (
        _tensors(images[rows], data.target[rows]) for rows in (train, validation, test)
    )
    return LabeledImages(first, second, third, num_classes=10)


def fashion_mnist(
    folder: str | os.PathLike[str] = FASHION_FOLDER, validation: int = 10_000, seed: int = 0
) -> LabeledImages:
    """Read Fashion-MNIST (Xiao et al. 2017), 28 x 28; validation comes out of the training part.

    Args:
        folder: Holds ``train-images-idx3-ubyte.gz`` and so on, by default where Debian's package
            ``dataset-fashion-mnist`` puts them.
        validation: Training images set aside, equally many of each class.
        seed: Of their choice.

    Raises:
        GatesError: A file is absent or damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise GatesError(
            f"{folder} is absent: install the Debian package {FASHION_PACKAGE} or name a folder "
            "with the four idx files of Fashion-MNIST"
        )
    parts: dict[str, tuple[NDArray[Any], NDArray[Any]]] = {}
    for name in ("train", "t10k"):
        images = read_idx(folder / f"{name}-images-idx3-ubyte.gz", 3)
        labels = read_idx(folder / f"{name}-labels-idx1-ubyte.gz", 1)
        if len(images) != len(labels):
            raise GatesError(f"{folder} has {len(images)} {name} images and {len(labels)} labels")
        parts[name] = (images / np.float32(255.0), labels)
    pixels, classes = parts["train"]
    train, held = train_test_split(
        np.arange(len(classes)), test_size=validation, stratify=classes, random_state=seed
    )
    return LabeledImages(
        _tensors(pixels[train], classes[train]),
        _tensors(pixels[held], classes[held]),
        _tensors(*parts["t10k"]),
        num_classes=10,
    )


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Read a compressed idx file of bytes.

    Raises:
        GatesError: The file is absent, damaged, or has other dimensions.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        what = getattr(error, "strerror", None) or str(error)
        raise GatesError(f"{path} cannot be read: {what}; install or copy it again") from error
    start = 4 * (dimensions + 1)
    header = np.frombuffer(content[:start].ljust(start, b"\0"), dtype=">i4")
    shape = tuple(int(side) for side in header[1:])
    if header[0] != _MAGIC[dimensions] or len(content) - start != np.prod(shape):
        raise GatesError(f"{path} is not an idx file of {dimensions} dimensions; copy it again")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)


def _tensors(images: NDArray[Any], labels: NDArray[Any]) -> tuple[Tensor, Tensor]:
    pixels = torch.from_numpy(np.array(images, dtype=np.float32))
    return pixels[:, None], torch.from_numpy(np.array(labels, dtype=np.int64))
