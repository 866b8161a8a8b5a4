"""What a monitor measured, as a table to read and as JSON to keep."""

import json
import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class GateReport:
    """Figures and distributions of every gate.

    Attributes:
        figures: Gate name -> figure -> value.
        distributions: Gate name -> distribution -> counts.
    """

    figures: dict[str, dict[str, float]]
    distributions: dict[str, dict[str, Tensor]]

    def table(self) -> str:
        """Return Markdown tables, one for the gates of a kind, a row for every gate.

        Gates are of a kind if they have a first figure in common. A figure that a gate lacks is
        left empty.
        """
        kinds: dict[str, dict[str, dict[str, float]]] = {}
        for name, figures in self.figures.items():
            kinds.setdefault(next(iter(figures)), {})[name] = figures
        return "\n\n".join(_table(gates) for gates in kinds.values())

    def json(self) -> str:
        """Return both parts as JSON; what is not finite becomes null."""
        distributions = {
            gate: {name: counts.tolist() for name, counts in parts.items()}
            for gate, parts in self.distributions.items()
        }
        content = {"figures": self.figures, "distributions": distributions}
        return json.dumps(_finite(content), indent=2, allow_nan=False)


def _table(gates: dict[str, dict[str, float]]) -> str:
    columns = list(dict.fromkeys(column for figures in gates.values() for column in figures))
    rows = [["gate", *columns]]
    for name, figures in gates.items():
        rows.append([name, *(f"{figures[c]:.4g}" if c in figures else "" for c in columns)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(_line(row, widths) for row in rows)


def _line(cells: list[str], widths: list[int]) -> str:
    first, *others = zip(cells, widths, strict=True)
    aligned = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
    return f"| {' | '.join(aligned)} |"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
