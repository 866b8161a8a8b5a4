"""The gate section of a report, the same for every application."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from core_gates import GateMonitor
from core_gates.errors import GatesError
from harness.figures import bar_panels, panel_grid
from harness.figures.style import SHARES
from harness.files.atomic import write_json
from harness.report.page import Page

FILE = "gates.json"
VALUE_COLUMNS = ("mean", "std", "zero", "closed", "open", "non_finite")
ROUTING_COLUMNS = (
    "active", "load_cv", "load_max_violation", "load_entropy", "entropy", "dead", "unrouted",
    "dropped", "churn", "coactivation", "non_finite",
)  # fmt: skip
EXPERT_COLUMNS = ("zero_rate", "near_zero_rate", "zero_rate_max", "std_ratio", "non_finite")


def save_gates(monitor: GateMonitor, folder: Path) -> Path:
    """Keep what a monitor measured in the run folder."""
    report = monitor.report()
    experts = {
        name: {part: counts.tolist() for part, counts in parts.items()}
        for name, parts in report.distributions.items()
    }
    histograms = {
        name: parts.pop("histogram") for name, parts in experts.items() if "histogram" in parts
    }
    content = {"figures": report.figures, "histograms": histograms, "experts": experts}
    return write_json(folder / FILE, content)


def read_gates(path: Path) -> dict[str, Any]:
    """Read what `save_gates` kept.

    Raises:
        GatesError: The file is damaged.
    """
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(kept[part], dict) for part in ("figures", "histograms", "experts")):
            raise ValueError("no figures of gates")
        return dict(kept)
    except (ValueError, KeyError, TypeError) as error:
        raise GatesError(f"{path} is damaged ({error}): run `evaluate` again") from error


def gate_section(page: Page, folder: Path, explanation: str) -> None:
    """Add tables and figures of the gates, if `save_gates` kept any.

    Args:
        page: The report.
        folder: The run folder.
        explanation: What was measured.

    Raises:
        GatesError: What was kept is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return
    kept = read_gates(path)
    values, routings, experts = (
        {name: found for name, found in kept["figures"].items() if mark in found}
        for mark in ("mean", "active", "zero_rate")
    )
    if not (values or routings or experts):
        return
    histograms = kept["histograms"]
    page.section("Gates").text(explanation)
    if values:
        _table(page, values, VALUE_COLUMNS)
        page.figure(
            histogram_figure({name: histograms[name] for name in values}),
            "Histogram of the values of every gate: 0, closed, at the left; 1, open, at the right.",
            name="gate_values",
        )
    if routings:
        _add_routings(page, routings, kept)
    if experts:
        _table(page, experts, EXPERT_COLUMNS)


def histogram_figure(histograms: dict[str, list[float]]) -> Figure:
    """Draw counts over [0, 1], one panel per gate."""
    return bar_panels(histograms, span=(0, 1))


def load_figure(loads: dict[str, list[float]]) -> Figure:
    """Draw the load of every expert, one panel per gate; the line is an even load."""
    totals = {name: sum(load) or 1 for name, load in loads.items()}
    shares = {name: [count / totals[name] for count in load] for name, load in loads.items()}
    return bar_panels(shares, lines={name: 1 / len(load) for name, load in loads.items()})


def coactivation_figure(tables: dict[str, list[list[float]]]) -> Figure:
    """Draw how often an expert (column) works with another (row), one panel per gate."""
    figure, panels = panel_grid(list(tables))
    for axis, table in zip(panels, tables.values(), strict=True):
        shares = [[count / (row[i] or 1) for count in row] for i, row in enumerate(table)]
        axis.imshow(shares, cmap=SHARES, vmin=0, vmax=1, interpolation="nearest")
        axis.spines[["bottom"]].set_visible(False)
        axis.set_xticks([])
    return figure


def _add_routings(page: Page, routings: dict[str, dict[str, Any]], kept: dict[str, Any]) -> None:
    _table(page, routings, ROUTING_COLUMNS)
    page.figure(
        load_figure({name: kept["experts"][name]["load"] for name in routings}),
        "Fraction of the tokens that each expert gets; the line is an even load.",
        name="expert_shares",
    )
    page.figure(
        histogram_figure({name: kept["histograms"][name] for name in routings}),
        "Distribution of the routed weights, from 0 to 1.",
        name="routed_weights",
    )
    pairs = {
        name: kept["experts"][name]["coactivation"]
        for name, found in routings.items()
        if "coactivation" in kept["experts"][name] and found["active"] > 1
    }
    if pairs:
        page.figure(
            coactivation_figure(pairs),
            "Experts that work together: tokens that use both, over those of the row.",
            name="experts_together",
        )


def _table(page: Page, gates: dict[str, dict[str, Any]], columns: Sequence[str]) -> None:
    """Add the columns that any gate has."""
    shown = [column for column in columns if any(column in found for found in gates.values())]
    rows = [[name, *(found.get(column, "") for column in shown)] for name, found in gates.items()]
    page.table(["gate", *shown], rows)
