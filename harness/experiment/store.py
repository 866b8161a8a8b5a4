"""Results of pieces: found in the run folder or in the package, never taken for another."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from core_gates.errors import GatesError
from harness.experiment.forms import Form
from harness.experiment.piece import Piece
from harness.experiment.record import LENGTHENED, Record, digests, gap, read_record, refuse_changed
from harness.files import replacing

R = TypeVar("R")
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
        own, packaged = self.folder / piece.name, self._packaged(piece)
        if own.is_dir() and (packaged is None or self.holds(piece)):
            record = read_record(own)
            found = gap(record, piece)
            if not found:
                return own
            if record is not None and record.settings.get(LENGTHENED) and not self.overwrite:
                raise SettingsDiffer(
                    f"{own} was lengthened with --resume, unlike what is asked for: give --name "
                    "NEW for another run, or --overwrite to train again"
                )
            if not self.overwrite:
                raise SettingsDiffer(
                    f"{own} was made with other settings ({found}): give those, or --name NEW for "
                    "another run, or --overwrite to replace it"
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
        own = self.folder / piece.name
        return own.is_dir() and not gap(read_record(own), piece)

    def missing(self, pieces: Iterable[Piece]) -> list[Piece]:
        """Return the pieces without a result, each once.

        Raises:
            SettingsDiffer: See :meth:`find`.
        """
        return [piece for piece in dict.fromkeys(pieces) if self.find(piece) is None]

    def reasons(self, pieces: Sequence[Piece]) -> list[str]:
        """Return why existing results of some of the first pieces do not qualify, a line each."""
        found = []
        for piece in pieces[:NAMED]:
            places = [folder / piece.name for folder in (self.folder, *self.read_only)]
            gaps = [(place, gap(read_record(place), piece)) for place in places if place.is_dir()]
            if gaps:
                found.append(f"{gaps[0][0]} has {gaps[0][1]}")
        return found

    def record(self, piece: Piece) -> Record:
        """Return what a result was made with.

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
