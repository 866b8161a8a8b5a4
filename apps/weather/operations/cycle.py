"""``gates weather cycle``: forecast, observe, assimilate, over a long period."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from apps.weather.assimilation import Assimilation, LeftOutTally
from core_gates.errors import GatesError
from harness.files import short_digest
from harness.runs.environment import made_by
from harness.runs.ticker import ticking
from weather.assimilation import WINDOW_HOURS, Reports
from weather.experiments.experiment import shown
from weather.observations.archive import ReportArchive
from weather.operations.cycling import DEPARTURES, CycleParts, run_cycle
from weather.state import Normalizer

WITHOUT_EFFECT = ("weights", "background", "observations")
"""Attributes whose content is identified by others."""


class Period(NamedTuple):
    """When a cycle runs.

    Attributes:
        start: Time of the first background in its store, or first or last.
        cycles: Number of analyses; None for all that the reports last.
    """

    start: str
    cycles: int | None


class CycleCommand(Assimilation):
    """One call of ``gates weather cycle``."""

    def cycle(
        self, forecast: str, period: Period, path: Path, *, limit: float, overwrite: bool
    ) -> Reports:
        """Write the cycle into a folder; see ``gates weather cycle --help``.

        Raises:
            GatesError: An input is missing, damaged or does not fit the configuration, no report
                belongs to an analysis, or the cycle diverges.
        """
        if period.cycles is not None and period.cycles < 1:
            raise GatesError(f"--cycles must be at least 1, found {period.cycles}")
        if not limit > 0:
            raise GatesError(f"--divergence_limit must be positive, found {limit:g}")
        inputs = self.inputs
        first, start = self._first(period.start)
        archive = ReportArchive(Path(inputs.observations), ticking)
        times = self._times(archive, start, period.cycles)
        line = self._require_any(archive, times)
        assimilator, sd = self._method(inputs.method, inputs.weights)
        reports = self._reports(lambda time: archive.around(time, WINDOW_HOURS), sd)
        model = self._forecast(forecast).forecast
        facts = {**self.attributes, **self._facts(archive, first, start), "divergence_limit": limit}
        settings = {name: facts[name] for name in facts if name not in WITHOUT_EFFECT}
        settings["options"] = short_digest(self.run_of.settings)
        parts = CycleParts(
            reports, assimilator, model, self.model.hours, self._units(assimilator), limit
        )
        title = {"title": "A cycle by gates weather cycle"}
        found = run_cycle(
            parts, first, times, path, settings=settings,
            attributes={**title, **facts, **made_by()}, overwrite=overwrite, progress=ticking,
        )  # fmt: skip
        for text in (line, reports.warning()):
            if text:
                print(text)
        return found

    def _first(self, start: str) -> tuple[Tensor, np.datetime64]:
        """Return the first background (C,H,W) and its time."""
        states, times = self._background(self.inputs.background, start)
        if len(times) > 1:
            raise GatesError(f"--start {start} names {len(times)} times: give one")
        return states[0], times[0]

    def _times(
        self, archive: ReportArchive, start: np.datetime64, cycles: int | None
    ) -> np.ndarray:
        step = np.timedelta64(round(self.model.hours * 3600), "s")
        if cycles is None:
            half = np.timedelta64(round(WINDOW_HOURS * 3600), "s")
            cycles = max(1, int((archive.last + half - start) // step) + 1)
        return start + np.arange(cycles) * step

    def _require_any(self, archive: ReportArchive, times: np.ndarray) -> str:
        """Return which reports are left out.

        Raises:
            GatesError: All of them are.
        """
        tally, good = LeftOutTally(), 0
        for table in archive.tables():
            frame = table.frame
            half = np.timedelta64(round(WINDOW_HOURS * 3600), "s")
            near = (times >= np.datetime64(frame["time"].min()) - half) & (
                times <= np.datetime64(frame["time"].max()) + half
            )
            tally.add(table, self.experiment.channels, times[near])
            good += int((frame["qc"] == 0).sum())
        if archive.flagged:
            print(f"{archive.flagged} of {archive.count} reports are out of range or flagged, "
                  "left out")  # fmt: skip
        line = tally.line()
        if good <= tally.unused:
            first, last = (np.datetime_as_string(time, unit="m") for time in (times[0], times[-1]))
            raise GatesError(
                f"{self.inputs.observations}: no report belongs to an analysis of {first} to "
                f"{last}{f', {line}' if line else ''}: nothing is written, give reports of that "
                "time or another --start"
            )
        return line

    def _facts(self, archive: ReportArchive, first: Tensor, start: np.datetime64) -> dict[str, Any]:
        inputs = self.inputs
        return {
            "background": inputs.background,
            "background_digest": short_digest(first.flatten().tolist(), 64),
            "start": np.datetime_as_string(start, unit="s"),
            "observations": inputs.observations,
            "observations_sha256": archive.digest,
            "window_hours": WINDOW_HOURS,
            "cycle_hours": self.model.hours,
            "gross_check": inputs.gross_check,
            "observation_operator": inputs.observation_operator,
        }

    def _units(self, assimilator: Any) -> Normalizer:
        """Return mean and standard deviation of the climate: of the network, or of the data."""
        network = getattr(assimilator, "network", assimilator)
        found = getattr(network, "normalizer", None)
        return found if isinstance(found, Normalizer) else self.experiment.normalizer


def summary(path: Path, reports: Reports) -> list[str]:
    """Return what a cycle has used, and how far it lies from it, as lines to print."""
    counts = reports.counts()
    used, rejected = sum(counts["used_cells"]), sum(counts["rejected_cells"])
    outages = sum(not one for one in counts["used_cells"])
    lines = [
        f"{len(reports.observed)} cycles, {used} cells used, {rejected} rejected by the gross "
        f"check, {outages} cycles without observations"
    ]
    table = pd.read_csv(path / DEPARTURES)
    labels = {name.removeprefix("ob_rms_") for name in shown(reports.channels, "ob_rms")}
    for label, rows in table[table["used"] > 0].groupby("channel", sort=False):
        if label in labels:
            weights = torch.from_numpy(rows["used"].to_numpy(float))
            squares = (torch.from_numpy(rows[n].to_numpy(float) ** 2) for n in ("ob_rms", "oa_rms"))
            ob, oa = (float((one * weights).sum() / weights.sum()) ** 0.5 for one in squares)
            lines.append(
                f"{label!s}  O-B {ob:.4g}  O-A {oa:.4g}  rms of {int(weights.sum())} cells"
            )
    return lines
