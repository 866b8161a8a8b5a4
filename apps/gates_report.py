"""The gate section of a report, the same for every application."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.figure import Figure

from apps.files import write_json
from apps.report import Page
from core_gates.monitor import GateMonitor

FILE = "gates.json"


def save_gates(monitor: GateMonitor, folder: Path) -> Path:
    """Keep what a monitor measured in the run folder."""
    histograms = {name: parts["histogram"].tolist() for name, parts in monitor.histograms().items()}
    return write_json(folder / FILE, {"figures": monitor.compute(), "histograms": histograms})


def gate_section(page: Page, folder: Path, explanation: str) -> None:
    """Add a table and histograms of the gates, if `save_gates` kept any.

    Args:
        page: The report.
        folder: The run folder.
        explanation: What was measured.
    """
    path = folder / FILE
    if not path.is_file():
        return
    kept = json.loads(path.read_text(encoding="utf-8"))
    figures = {name: found for name, found in kept["figures"].items() if "mean" in found}
    if not figures:
        return
    columns = ("mean", "std", "closed", "open", "non_finite")
    rows = [[name, *(found[column] for column in columns)] for name, found in figures.items()]
    page.section("Gates").text(explanation).table(["gate", *columns], rows)
    page.figure(
        histogram_figure({name: kept["histograms"][name] for name in figures}),
        "Distribution of the values of every gate, from closed to open.",
    )


def histogram_figure(histograms: dict[str, list[float]]) -> Figure:
    """Draw counts over [0, 1], one row of panels for all gates."""
    columns = min(5, len(histograms))
    rows = -(-len(histograms) // columns)
    figure = Figure(figsize=(2.3 * columns, 1.5 * rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (name, counts) in zip(axes.flat, histograms.items(), strict=False):
        bins = len(counts)
        axis.set_axis_on()
        axis.bar([(i + 0.5) / bins for i in range(bins)], counts, width=1 / bins, color="#0072B2")
        axis.set_title(name, fontsize=8)
        axis.set_yticks([])
        axis.set_xlim(0, 1)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right", "left"]].set_visible(False)
    return figure
