"""Where millimeters mean something: the scope that a model was calibrated for."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from core_gates.errors import GatesError
from endoscopy.data.tables.frame_table import SYNTHETIC
from endoscopy.metrics.columns import PROBABILITIES

NO_CALIBRATION = "no millimeter calibration for this scope"
RESEARCH_ONLY = "research only"
MANIFEST = "manifest.json"
OF_MILLIMETERS = ("lower_mm", "upper_mm", "size_class", "interval_crosses", *PROBABILITIES)


@dataclass(frozen=True)
class Scope:
    """For which sources a model gives millimeters.

    On a source of another scope, sizes are given not in millimeters but as a size index: the
    predicted size over ``reference_mm``, 1 for a lesion that the model considers average.

    Args:
        trained_on: Name of the training data, for the model card.
        calibrated_for: Scopes in which millimeters are given; ``synthetic`` is that of rendered
            frames.
        reference_mm: Geometric mean of the training sizes.

    Raises:
        ValueError: The reference is not positive.
    """

    trained_on: str = SYNTHETIC
    calibrated_for: tuple[str, ...] = (SYNTHETIC,)
    reference_mm: float = 6.3

    def __post_init__(self) -> None:
        if not self.reference_mm > 0:
            raise ValueError(f"reference_mm must be positive, got {self.reference_mm}")

    def is_calibrated(self, source: str | None) -> bool:
        """Return whether sizes on a source of this scope may be given in millimeters."""
        return source is not None and source in self.calibrated_for

    def express(self, table: pd.DataFrame, source: str | None) -> pd.DataFrame:
        """Return predictions as they may be shown for a source.

        Args:
            table: With ``predicted_mm`` and perhaps what follows from it in millimeters.
            source: Scope of the source, None if unknown.

        Returns:
            The table itself if the scope is calibrated, else one in which ``size_index`` stands for
            the size and a column ``note`` gives the reason; intervals, classes and their
            probabilities, which are in terms of millimeters, are left out.
        """
        if self.is_calibrated(source):
            return table
        shown = table.drop(columns=[name for name in OF_MILLIMETERS if name in table])
        shown["predicted_mm"] = table["predicted_mm"] / self.reference_mm
        return shown.rename(columns={"predicted_mm": "size_index"}).assign(note=NO_CALIBRATION)

    def text(
        self, size_mm: float, source: str | None, low: float = math.nan, high: float = math.nan
    ) -> str:
        """Return a size as it may be shown for a source, in millimeters with a finite interval."""
        if not self.is_calibrated(source):
            return f"size index {size_mm / self.reference_mm:.2f}"
        interval = ""
        if math.isfinite(low) and math.isfinite(high):
            interval = f" ({low:.3g} to {high:.3g})"
        return f"{size_mm:.1f} mm{interval}"

    def lines(self, source: str | None) -> list[str]:
        """Return the lines that must accompany every number."""
        if self.is_calibrated(source):
            return [f"{RESEARCH_ONLY}; millimeters are calibrated for the scope {source!r}"]
        return [
            f"{RESEARCH_ONLY}; {NO_CALIBRATION}: the size index is relative to an average lesion "
            f"of the training data ({self.trained_on}), and no size in millimeters"
        ]


def source_scope(source: str | Path, stated: str | None = None) -> str | None:
    """Return the scope of a source, None if unknown.

    The manifest of prepared data, in the folder of the source or up to two above it, names it;
    otherwise the user does. Only a manifest can declare frames synthetic.

    Raises:
        GatesError: The statement contradicts the manifest, or claims synthetic frames without one.
    """
    path = Path(source).absolute()
    folders = [path, *path.parents][: 3 if path.is_dir() else 4]
    for folder in folders:
        named = _named_in(folder / MANIFEST)
        if named is not None:
            if stated not in (None, named):
                raise GatesError(
                    f"{source}: its manifest names the scope {named!r}, not {stated!r}; leave the "
                    "scope out"
                )
            return named
    if stated == SYNTHETIC:
        raise GatesError(
            f"{source}: has no {MANIFEST} that declares its frames synthetic; render or prepare "
            "them, or leave the scope out"
        )
    return stated


def _named_in(path: Path) -> str | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return None
    named = content.get("scope") if isinstance(content, dict) else None
    return named if isinstance(named, str) else None
