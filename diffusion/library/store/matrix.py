"""Embeddings as rows of one file, which is mapped into memory."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from diffusion.library.errors import LibraryError

Vectors = NDArray[np.float32]


class Matrix:
    """float32 numbers (rows, dim) without a header; the index knows which rows are in use.

    Rows are written and flushed to the disk before the index names them, and only rows that it does
    not name are written. What a killed process leaves is therefore never read.

    Args:
        folder: Of the index.
        fingerprint: Of the encoder.
        dim: Numbers of a row.
    """

    def __init__(self, folder: Path, fingerprint: str, dim: int) -> None:
        self.path = folder / file_name(fingerprint)
        self.dim = dim

    def __len__(self) -> int:
        """Return the number of rows that are whole."""
        try:
            return self.path.stat().st_size // (4 * self.dim)
        except FileNotFoundError:
            return 0

    def write(self, rows: Mapping[int, Vectors]) -> None:
        """Write rows, and return when the disk has them."""
        created = not self.path.exists()
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            for row, vector in rows.items():
                raw = vector.astype("<f4").tobytes()
                place, done = row * 4 * self.dim, 0
                while done < len(raw):
                    done += os.pwrite(descriptor, raw[done:], place + done)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if created:
            _flush_folder(self.path.parent)

    def view(self) -> Vectors:
        """Return all rows (rows, dim), read-only and read from the disk on demand."""
        if not len(self):
            return np.empty((0, self.dim), np.float32)
        mapped = np.memmap(self.path, "<f4", "r", shape=(len(self), self.dim))
        return np.asarray(mapped)


def file_name(fingerprint: str) -> str:
    """Return the name of the file for an encoder."""
    return f"embeddings-{hashlib.sha256(fingerprint.encode()).hexdigest()[:16]}.f32"


def unit_vector(vector: Tensor, dim: int) -> Vectors:
    """Return an embedding as float32 numbers (dim,) of unit length.

    Raises:
        LibraryError: It has another size, is not finite, or is zero.
    """
    values = vector.detach().double().cpu().numpy()
    length = float(np.linalg.norm(values))
    if values.shape != (dim,) or not np.isfinite(length) or length == 0:
        raise LibraryError(
            f"an encoder gives a vector of shape {values.shape} and length {length:g}, expected "
            f"({dim},) and 1: choose another encoder"
        )
    return (values / length).astype(np.float32)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
