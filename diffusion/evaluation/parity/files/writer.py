"""Adapter files in any dialect with their exact ΔW, from the definitions of the formats alone.

It imports nothing of the package that reads them.
"""

import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from diffusion.evaluation.parity.files.dialects import NAMES, Layer
from diffusion.evaluation.parity.files.factors import PAIRS

Array = np.ndarray[Any, np.dtype[np.float64]]


class Written(NamedTuple):
    """A file and what it means.

    Attributes:
        family: ``flux`` or ``sd3``.
        tensors: What is stored.
        expected: Layer in diffusers -> ΔW.
        base: Layer -> the weight of a base, which DoRA refers to.
        dialects: Of the names.
    """

    family: str
    tensors: dict[str, Tensor]
    expected: dict[str, Array]
    base: dict[str, Tensor]
    dialects: set[str]

    def save(self, path: Path, metadata: dict[str, str] | None = None) -> Path:
        """Write the file."""
        save_file(self.tensors, path, metadata)
        return path


class Writer:
    """Draws the tensors of one file.

    Args:
        seed: Of values, ranks and α.
        dtype: That factors are stored in; what is expected is computed from the rounded values.
        alpha: Whether α is stored.
    """

    def __init__(
        self, seed: int, dtype: torch.dtype = torch.float32, *, alpha: bool = True
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.dtype, self.alpha = dtype, alpha
        self.tensors: dict[str, Tensor] = {}
        self.expected: dict[str, Array] = {}
        self.base: dict[str, Tensor] = {}

    def layer(self, name: str, layer: Layer, kind: str) -> None:
        """Draw the change of a layer.

        Args:
            name: In the file, with its prefix.
            layer: What is changed.
            kind: Of its factors.
        """
        outputs, rank = sum(layer.parts.values()), int(self.rng.integers(1, 4))
        method = self._loha if "loha" in kind else self._lokr if "lokr" in kind else self._pair
        found, divisor = method(name, kind, outputs, layer.inputs, rank)
        change: Any = found
        if self.alpha:
            value = float(self.rng.integers(1, 9)) / 2
            self.tensors[f"{name}.alpha"] = torch.tensor(value)
            change = change * (1 if divisor is None else value / divisor)
        weight = self.rng.normal(size=change.shape)
        if kind.startswith("dora"):
            change = self._dora(name, kind, weight, change)
        if layer.swapped:
            change, weight = (np.roll(m, len(m) // 2, axis=0) for m in (change, weight))
        start = 0
        for part, rows in layer.parts.items():
            self.expected[part] = change[start : start + rows]
            self.base[part] = torch.from_numpy(weight[start : start + rows].copy())
            start += rows

    def _put(self, name: str, shape: tuple[int, ...], ones: tuple[int, ...] = ()) -> Array:
        """Draw a tensor, and return its rounded values."""
        stored = torch.from_numpy(self.rng.normal(size=shape)).to(self.dtype)
        self.tensors[name] = stored.reshape(*shape, *ones).clone()
        values: Array = stored.double().numpy()
        return values

    def _pair(
        self, name: str, kind: str, outputs: int, inputs: int, rank: int
    ) -> tuple[Array, int | None]:
        down, up = PAIRS[kind]
        ones = (1, 1) if kind in ("convolution", "tucker") else ()
        a = self._put(f"{name}.{down}", (rank, inputs), ones)
        b = self._put(f"{name}.{up}", (outputs, rank), ones)
        if kind == "tucker":
            b = b @ self._put(f"{name}.lora_mid.weight", (rank, rank), (1, 1))
        return b @ a, rank

    def _loha(
        self, name: str, kind: str, outputs: int, inputs: int, rank: int
    ) -> tuple[Array, int | None]:
        product = np.ones((outputs, inputs))
        for n in (1, 2):
            if kind == "loha":
                a = self._put(f"{name}.hada_w{n}_a", (outputs, rank))
                product *= a @ self._put(f"{name}.hada_w{n}_b", (rank, inputs))
            else:
                a = self._put(f"{name}.hada_w{n}_a", (rank, outputs))
                core = self._put(f"{name}.hada_t{n}", (rank, rank), (1, 1))
                product *= a.T @ core @ self._put(f"{name}.hada_w{n}_b", (rank, inputs))
        return product, rank

    def _lokr(
        self, name: str, kind: str, outputs: int, inputs: int, rank: int
    ) -> tuple[Array, int | None]:
        sizes = ((2, 2), (outputs // 2, inputs // 2))
        halves: list[Array] = []
        divisor, own = None, (rank + 1, rank)
        for n, form, (rows, columns), r in zip((1, 2), kind.split()[1], sizes, own, strict=True):
            if form == "w":
                halves.append(self._put(f"{name}.lokr_w{n}", (rows, columns)))
                continue
            divisor = r
            if form == "f":
                a = self._put(f"{name}.lokr_w{n}_a", (rows, r))
            else:
                a = self._put(f"{name}.lokr_w{n}_a", (r, rows)).T
                a = a @ self._put(f"{name}.lokr_t{n}", (r, r), (1, 1))
            halves.append(a @ self._put(f"{name}.lokr_w{n}_b", (r, columns)))
        product: Any = np.kron(*halves)
        return product, divisor

    def _dora(self, name: str, kind: str, weight: Array, change: Array) -> Array:
        axis = 0 if kind == "dora columns" else 1
        size = change.shape[1 - axis]
        stored = torch.from_numpy(self.rng.uniform(1, 2, size)).float()
        magnitude = stored.double().numpy().reshape((1, -1) if axis == 0 else (-1, 1))
        if kind == "dora peft":
            self.tensors[f"{name}.lora_magnitude_vector"] = stored
        else:
            self.tensors[f"{name}.dora_scale"] = stored.reshape(magnitude.shape)
        changed = weight + change
        norms = np.linalg.norm(changed, axis=axis, keepdims=True)
        found: Array = magnitude * changed / norms - weight
        return found


def write(
    names: str,
    kind: str,
    prefix: str = "",
    *,
    layers: int | None = None,
    dtype: torch.dtype = torch.float32,
    alpha: bool = True,
    seed: int | None = None,
) -> Written:
    """Draw a file of one dialect.

    Args:
        names: Key of :data:`NAMES`.
        kind: One of those that :func:`kinds_of` returns for the names.
        prefix: One of :data:`PREFIXES`; one that ends with an underscore replaces dots.
        layers: Number of layers that are drawn; all of them if None.
        dtype: That factors are stored in.
        alpha: Whether α is stored.
        seed: Of everything; by default it follows from the dialect.
    """
    seed = zlib.crc32(f"{names} {kind} {prefix}".encode()) if seed is None else seed
    writer = Writer(seed, dtype, alpha=alpha)
    family, chosen = NAMES[names]
    if layers is not None and layers < len(chosen):
        order = writer.rng.permutation(len(chosen))[:layers]
        chosen = [chosen[i] for i in sorted(order)]
    for layer in chosen:
        name = layer.name.replace(".", "_") if prefix.endswith("_") else layer.name
        writer.layer(prefix + name, layer, kind)
    return Written(family, writer.tensors, writer.expected, writer.base, {names})
