"""Results of pieces in the form of their kind, found in the run folder or in the package."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from core_gates.errors import GatesError
from harness.files import replacing, write_json
from harness.files.piece import LENGTHENED, Piece, Record, digests, gap, read_record, refuse_changed
from harness.files.rounding import from_8_bits

if TYPE_CHECKING:
    import pandas as pd


R = TypeVar("R")


class Form(Protocol[R]):
    """Saves a result into a folder and loads it from there.

    ``load`` raises ``GatesError`` for a file that is missing or damaged.
    """

    def save(self, folder: Path, result: R) -> None:
        """Write a result into an empty folder, where ``record.json`` joins it."""

    def load(self, folder: Path) -> R:
        """Read what `save` wrote."""


class Written:
    """What a function writes, loaded as the folder that holds it.

    Args:
        write: Writes a result into a folder.
    """

    def __init__(self, write: Callable[[Path, Any], object]) -> None:
        self.write = write

    def save(self, folder: Path, result: Any) -> None:
        """Write a result."""
        self.write(folder, result)

    def load(self, folder: Path) -> Path:
        """Return the folder."""
        return folder


class Figures:
    """Plain values of JSON, such as scores by name; NaN survives, an infinity becomes NaN."""

    FILE = "result.json"

    def save(self, folder: Path, result: Mapping[str, Any]) -> None:
        """Write ``result.json``."""
        write_json(folder / self.FILE, dict(result))

    def load(self, folder: Path) -> dict[str, Any]:
        """Read ``result.json``.

        Raises:
            GatesError: It is missing or damaged.
        """
        path = folder / self.FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise damaged(path, error) from error
        if not isinstance(content, dict):
            raise damaged(path, TypeError(f"it holds {type(content).__name__}, no names"))
        return {name: math.nan if value is None else value for name, value in content.items()}


class Arrays:
    """Tensors by name, as safetensors; what is stored in 8 bits is restored."""

    FILE = "result.safetensors"

    def save(self, folder: Path, result: Mapping[str, Tensor]) -> None:
        """Write ``result.safetensors``."""
        tensors = {
            name: value.detach().cpu().clone().contiguous() for name, value in result.items()
        }
        save_file(tensors, folder / self.FILE)

    def load(self, folder: Path) -> dict[str, Tensor]:
        """Read ``result.safetensors``.

        Raises:
            GatesError: It is missing or damaged.
        """
        path = folder / self.FILE
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise damaged(path, error) from error
        return from_8_bits(tensors)


class Table:
    """A data frame, as Parquet."""

    FILE = "result.parquet"

    def save(self, folder: Path, result: pd.DataFrame) -> None:
        """Write ``result.parquet``."""
        result.to_parquet(folder / self.FILE, index=False)

    def load(self, folder: Path) -> pd.DataFrame:
        """Read ``result.parquet``.

        Raises:
            GatesError: It is missing or damaged.
        """
        import pandas as pd

        path = folder / self.FILE
        try:
            return pd.read_parquet(path)
        except (OSError, ValueError) as error:  # pa.ArrowInvalid is a ValueError
            raise damaged(path, error) from error


def cast(result: Any, dtype: torch.dtype | None) -> Any:
    """Return tensors by name in another floating-point type; any other result as it is."""
    if dtype is None or not isinstance(result, Mapping):
        return result
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in result.items()
    }


def damaged(path: Path, error: Exception) -> GatesError:
    """Return the error that the file of a result cannot be read."""
    return GatesError(
        f"{path} is missing or damaged ({type(error).__name__}): delete {path.parent} to have it "
        "made again"
    )


NAMED = 4  # pieces whose results are explained
OWN_FIELDS = ("seconds", "revision", "command", "origin")  # of a record


class SettingsDiffer(GatesError):  # noqa: N818
    """A result of the run folder has settings other than the current ones."""


class Store(Generic[R]):
    """Results of one kind: ``<run>/<kind>/<piece>/{record.json, result.*}``.

    Args:
        kind: What they are, such as ``weights``.
        form: How they are saved.
        folder: Run folder.
        shipped: Folder of the configuration in the package; None to pass it over.
        others: Folders of the configurations that this one extends: their runs, then in the
            package. They are read after those before, and never written.
        overwrite: Whether results of the run folder with other settings are replaced.
        origin: Package, configuration and command, for records.
    """

    def __init__(
        self,
        kind: str,
        form: Form[R],
        folder: Path,
        shipped: Path | None = None,
        *,
        others: Sequence[Path] = (),
        overwrite: bool = False,
        origin: dict[str, Any] | None = None,
    ) -> None:
        self.kind, self.form = kind, form
        self.others = [other / kind for other in others]
        self.folder = folder / kind
        self.shipped = None if shipped is None else shipped / kind
        self.overwrite, self.origin = overwrite, origin or {}

    def find(self, piece: Piece) -> Path | None:
        """Return the folder of a result with these settings: of the run, else of the package.

        Raises:
            SettingsDiffer: That of the run folder has others, may not be overwritten, and the
                package has none.
        """
        folder, packaged = self.folder / piece.name, self._packaged(piece)
        if folder.is_dir() and (packaged is None or self.holds(piece)):
            record = read_record(folder)
            difference = gap(record, piece)
            if not difference:
                return folder
            if record is not None and record.settings.get(LENGTHENED) and not self.overwrite:
                raise SettingsDiffer(
                    f"{folder} was lengthened with --resume, unlike what is asked for: give --name "
                    "NEW for another run, or --overwrite to train again"
                )
            if not self.overwrite:
                raise SettingsDiffer(
                    f"{folder} was made with other settings ({difference}): give those, or --name "
                    "NEW for another run, or --overwrite to replace it"
                )
        return packaged

    def _packaged(self, piece: Piece) -> Path | None:
        """Return the folder of a result of the package, or of others, with these settings."""
        for place in self.read_only:
            path = place / piece.name
            if path.is_dir() and not gap(read_record(path), piece):
                return path
        return None

    @property
    def read_only(self) -> list[Path]:
        """Folders that are read but never written, the package first."""
        return [*([] if self.shipped is None else [self.shipped]), *self.others]

    def holds(self, piece: Piece) -> bool:
        """Return whether the run folder itself has a result with these settings."""
        folder = self.folder / piece.name
        return folder.is_dir() and not gap(read_record(folder), piece)

    def missing(self, pieces: Iterable[Piece]) -> list[Piece]:
        """Return the pieces without a result, each once.

        Raises:
            SettingsDiffer: See `find`.
        """
        return [piece for piece in dict.fromkeys(pieces) if self.find(piece) is None]

    def reasons(self, pieces: Sequence[Piece]) -> list[str]:
        """Return why existing results of some of the first pieces do not qualify, a line each."""
        reasons = []
        for piece in pieces[:NAMED]:
            places = [folder / piece.name for folder in (self.folder, *self.read_only)]
            gaps = [(place, gap(read_record(place), piece)) for place in places if place.is_dir()]
            if gaps:
                reasons.append(f"{gaps[0][0]} has {gaps[0][1]}")
        return reasons

    def record(self, piece: Piece) -> Record:
        """Return the record of a result: its settings, data and code version.

        Raises:
            GatesError: There is no such result.
        """
        path = self.find(piece)
        record = None if path is None else read_record(path)
        if record is None:
            raise GatesError(f"{self.kind} of {piece.name} are missing: run `evaluate` first")
        return record

    def load(self, piece: Piece, *, tested: Collection[str] = ()) -> R:
        """Return a result.

        Args:
            piece: Which.
            tested: Short hashes of what the result will be tested on.

        Raises:
            GatesError: It is missing, damaged or changed, or was trained on what it is to be
                tested on.
        """
        record = self.record(piece)
        if leaked := set(record.objects) & set(tested):
            raise GatesError(
                f"{piece.name} was trained on {len(leaked)} of the {len(set(tested))} objects that "
                "it is to be tested on: give the data and split that it was trained with"
            )
        path = self.find(piece)
        assert path is not None
        refuse_changed(path, record)
        return self.form.load(path)

    def keep(self, piece: Piece, result: R, *, objects: Iterable[str] = (), **facts: Any) -> Path:
        """Save a result with its record; it is whole or absent.

        Args:
            piece: Whose.
            result: What the form saves.
            objects: Short hashes of what it was trained on.
            facts: Other fields of the record, such as ``seconds``; the rest are its facts.
        """
        fields = dict(self.origin)
        fields |= {name: facts.pop(name) for name in OWN_FIELDS if name in facts}
        record = Record.of(piece, objects=sorted(set(objects)), facts=facts, **fields)
        target = self.folder / piece.name
        with replacing(target) as temporary:
            temporary.mkdir()
            self.form.save(temporary, result)
            record._replace(files=digests(temporary)).write(temporary)
        return target
