"""A CSV log that survives being killed: resuming cuts it back to the checkpoint and appends."""

import csv
import io
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers.logger import Logger

from harness.files.atomic import write_text


class ResumableCSVLogger(Logger):
    """Write ``metrics.csv``, one row per call, flushed at once.

    Lightning's own CSV logger deletes the file when a run is resumed. This one keeps the rows that
    belong to the checkpoint (see :meth:`truncate`) and appends, so that an interrupted training
    leaves the same bytes as an uninterrupted one. Columns are sorted; a new one rewrites the file.

    Args:
        folder: Folder of the run.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.path = self.folder / "metrics.csv"
        self.num_rows = 0
        self._columns: list[str] | None = None  # None: the file has not been opened yet

    @property
    def name(self) -> str:
        """Name of the run folder."""
        return self.folder.name

    @property
    def version(self) -> str:
        """A run folder has one version."""
        return ""

    @property
    def save_dir(self) -> str:
        """Folder of the run."""
        return str(self.folder)

    @property
    def experiment(self) -> Any:
        """The logger itself, which needs no outside service."""
        return self

    def truncate(self, num_rows: int) -> None:
        """Keep the first ``num_rows`` rows of the file and continue after them."""
        self.num_rows = num_rows
        self._columns = None

    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing to do: ``config.yaml`` holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Append one row.

        Args:
            metrics: Scalars by name.
            step: Optimizer steps done before this one.
        """
        if self._columns is None:
            self._open()
        row = {name: float(value) for name, value in metrics.items()}
        row["step"] = self.num_rows if step is None else step
        if "epoch" in row:
            row["epoch"] = int(row["epoch"])
        assert self._columns is not None
        if new := set(row) - set(self._columns):
            rows = self._read()
            self._columns = sorted({*self._columns, *new})
            self._rewrite(rows)
        with self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(_csv([row], self._columns, header=False))
        self.num_rows += 1

    def _open(self) -> None:
        rows = self._read()[: self.num_rows]
        self.num_rows = len(rows)
        self._columns = sorted({name for row in rows for name, value in row.items() if value})
        self._rewrite(rows)

    def _read(self) -> list[dict[str, str]]:
        if not self.path.is_file():
            return []
        with self.path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        assert self._columns is not None
        write_text(self.path, _csv(rows, self._columns, header=True))


def _csv(rows: list[dict[str, Any]], columns: list[str], *, header: bool) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore", lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
