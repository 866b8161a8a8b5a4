"""A cycle of forecasts and analyses over a long period, streamed to stores, resumable."""

from __future__ import annotations

import csv
import functools
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from core_gates.errors import GatesError
from harness.files import Partial, remove, resuming, short_digest
from weather.assimilation import WINDOW_HOURS, Remembering, Reports, WhereObserved, remembering
from weather.baselines.assimilator import AnalysisHistory, Assimilator
from weather.cycle import Cycle, CycleStep, Forecast, advance, diverged
from weather.data.writing import StreamedStore, create_states
from weather.experiments.experiment import shown
from weather.metrics import DepartureSums
from weather.observations.gridded import GriddedObservations
from weather.observations.ingest import ReportArchive
from weather.operations.analyses import Assimilation
from weather.operations.forecasts import CONFIGURED
from weather.operations.report_tables import LeftOut
from weather.progress import Progress, silent
from weather.state import Normalizer

ANALYSES, BACKGROUNDS, DEPARTURES = "analyses.zarr", "backgrounds.zarr", "departures.csv"
COLUMNS = ("time", "channel", "used", "rejected", "ob_bias", "ob_rms", "oa_bias", "oa_rms")
WITHOUT_EFFECT = ("weights", "background", "observations")
"""Attributes whose content is identified by others."""


class LongCycle(Assimilation):
    """A cycle of a forecast model with the reports of a long period."""

    def run(
        self,
        path: Path,
        *,
        start: str = "last",
        cycles: int | None = None,
        limit: float = 3.0,
        overwrite: bool = False,
        made_by: Mapping[str, Any] | None = None,
    ) -> Reports:
        """Write the cycle into a folder, see `run_cycle`.

        Args:
            path: Folder that is written.
            start: Time of the first background in its store, or first or last.
            cycles: Number of analyses; None for all that the reports last.
            limit: Root mean square departure from the climatological mean, in standard deviations,
                beyond which the cycle has diverged.
            overwrite: Replace an existing folder.
            made_by: Further attributes of the stores.

        Raises:
            GatesError: An input is missing, damaged or does not fit the configuration, no report
                belongs to an analysis, or the cycle diverges.
        """
        if cycles is not None and cycles < 1:
            raise GatesError(f"--cycles must be at least 1, found {cycles}")
        if not limit > 0:
            raise GatesError(f"--divergence_limit must be positive, found {limit:g}")
        states, starts = self._background(start)
        if len(starts) > 1:
            raise GatesError(f"--start {start} names {len(starts)} times: give one")
        archive = ReportArchive(Path(self.options.observations), self.progress)
        times = self._times(archive, starts[0], cycles)
        line = self._require_any(archive, times)
        table = functools.partial(archive.around, hours=WINDOW_HOURS)
        self._fit_task(table, states, times)
        assimilator, sd = self._method()
        reports = self._reports(table, sd)
        model = self._forecast(self.options.forecast or CONFIGURED).forecast
        facts = {**self.attributes, **self._facts(archive, states[0], starts[0])}
        facts["divergence_limit"] = limit
        settings = {name: facts[name] for name in facts if name not in WITHOUT_EFFECT}
        settings["options"] = short_digest(self.kept.settings)
        units = getattr(getattr(assimilator, "network", assimilator), "normalizer", None)
        units = units if isinstance(units, Normalizer) else self.experiment.normalizer
        parts = CycleParts(reports, assimilator, model, self.model.hours, units, limit)
        title = {"title": "A cycle by gates weather cycle"}
        run_cycle(
            parts, states[0], times, path, settings=settings,
            attributes={**title, **facts, **(made_by or {})}, overwrite=overwrite,
            progress=self.progress,
        )  # fmt: skip
        self._tell(reports, line)
        return reports

    def _times(
        self, archive: ReportArchive, start: np.datetime64, cycles: int | None
    ) -> np.ndarray:
        """Return the times of all analyses (T,)."""
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
        unused, half = LeftOut(), np.timedelta64(round(WINDOW_HOURS * 3600), "s")
        for table in archive.tables():
            first, last = table.frame["time"].min(), table.frame["time"].max()
            near = (times >= np.datetime64(first) - half) & (times <= np.datetime64(last) + half)
            unused.add(table, self.experiment.channels, times[near])
        if archive.flagged:
            self.say(
                f"{archive.flagged} of {archive.count} reports are out of range or flagged, "
                "left out"
            )
        unused.require_used(
            self.options.observations, times, "give reports of that time or another --start"
        )
        return unused.line()

    def _facts(self, archive: ReportArchive, first: Tensor, start: np.datetime64) -> dict[str, Any]:
        options = self.options
        return {
            "background": options.background,
            "background_digest": short_digest(first.flatten().tolist(), 64),
            "start": np.datetime_as_string(start, unit="s"),
            "observations": options.observations,
            "observations_sha256": archive.digest,
            "window_hours": WINDOW_HOURS,
            "cycle_hours": self.model.hours,
            "gross_check": options.gross_check,
            "observation_operator": options.observation_operator,
        }


def cycle_summary(path: Path, reports: Reports) -> list[str]:
    """Return what a cycle has used, and how far it lies from it, as lines.

    Args:
        path: Folder of the cycle.
        reports: With the counts of all cycles.
    """
    counts = reports.counts()
    used, rejected = sum(counts["used_cells"]), sum(counts["rejected_cells"])
    outages = sum(not cells for cells in counts["used_cells"])
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
            ob, oa = (float((square * weights).sum() / weights.sum()) ** 0.5 for square in squares)
            lines.append(
                f"{label!s}  O-B {ob:.4g}  O-A {oa:.4g}  rms of {int(weights.sum())} cells"
            )
    return lines


class CycleParts(NamedTuple):
    """What a cycle is made of.

    Attributes:
        reports: Observations, gridded and checked time by time.
        assimilator: The method, of one member.
        forecast: The forecast model; refuses what is not finite.
        hours: Length of a cycle.
        units: Mean and standard deviation of every channel in the climate.
        limit: Root mean square departure from that mean, in those standard deviations, of any
            channel, beyond which a cycle has diverged.
    """

    reports: Reports
    assimilator: Assimilator
    forecast: Forecast
    hours: float
    units: Normalizer
    limit: float


def run_cycle(
    parts: CycleParts,
    first: Tensor,
    times: np.ndarray,
    path: Path,
    *,
    settings: Mapping[str, Any],
    attributes: Mapping[str, Any],
    overwrite: bool = False,
    progress: Progress = silent,
) -> Reports:
    """Cycle from a first background and write a folder of backgrounds, analyses and departures.

    ``backgrounds.zarr`` and ``analyses.zarr`` are stores in the schema of WeatherBench 2,
    ``departures.csv`` has one row for every cycle and channel: cells used and rejected, mean and
    root mean square of observation minus background and minus analysis. A time without
    observations keeps its background. All that a cycle depends on is on disk when the next one
    begins: a call that is killed is continued by the same call, to the same bits, also with another
    number of cycles.

    Args:
        parts: Observations, method and model.
        first: (C,H,W), the background at the first time.
        times: (T,) datetime64, ``hours`` apart.
        path: Folder that is written.
        settings: All that decides the result but the number of cycles.
        attributes: Of both stores.
        overwrite: Replace an existing folder.
        progress: Shows how far the work is.

    Returns:
        The reports, with the counts of all cycles.

    Raises:
        GatesError: A background or an analysis has diverged or is not finite, the gross check
            rejects all that the first cycle observes of a channel, or the path is taken.
    """
    with resuming(path, settings, overwrite=overwrite) as partial:
        work = _Work(parts, partial, first, times, attributes)
        with torch.no_grad():
            work.run(progress)
        work.finish(attributes)
    return parts.reports


class _Work:
    """The cycles of one folder."""

    def __init__(
        self,
        parts: CycleParts,
        partial: Partial,
        first: Tensor,
        times: np.ndarray,
        attributes: Mapping[str, Any],
    ) -> None:
        self.parts, self.partial, self.times, self.first = parts, partial, times, first
        self.channels, folder = parts.reports.channels, partial.content
        if not partial.state:
            remove(folder)
            folder.mkdir()
            for name in (ANALYSES, BACKGROUNDS):
                create_states(folder / name, self.channels, parts.reports.grid, times=times,
                              attributes=attributes)  # fmt: skip
            (folder / DEPARTURES).write_text(_line(COLUMNS), encoding="utf-8")
        else:
            parts.reports.restore(partial.state["reports"])
            os.truncate(folder / DEPARTURES, partial.state["bytes"])
        self.analyses, self.backgrounds = (
            StreamedStore(folder / name) for name in (ANALYSES, BACKGROUNDS)
        )
        self.done = int(partial.state.get("cycles", 0))
        for store in (self.analyses, self.backgrounds):
            store.resize(times)
        if self.done > len(times):
            self._shorten()

    def _shorten(self) -> None:
        """Drop cycles that are no longer wanted."""
        self.done, reports = len(self.times), self.parts.reports
        del reports.observed[self.done :], reports.rejected[self.done :]
        path = self.partial.content / DEPARTURES
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(lines[: 1 + self.done * self.channels.num_channels]), "utf-8")
        self._save()

    def run(self, progress: Progress) -> None:
        """Take the cycles that are missing."""
        model = remembering(self.parts.forecast)
        cycle = Cycle(
            model,
            WhereObserved(self.parts.assimilator),
            self.parts.hours,
            quality_control=lambda _, background: self._observed(model, background),
        )
        with progress("cycling", len(self.times)) as tick:
            for _ in range(self.done):
                tick()
            steps = self._steps(cycle, model)
            while self.done < len(self.times):
                try:
                    step = next(steps)
                    self._check(step)
                except GatesError as error:
                    stamp = np.datetime_as_string(self.times[self.done], unit="m")
                    when = f"cycle {self.done + 1} of {len(self.times)}, {stamp}"
                    kept = f"{self.done} cycles are kept, --cycles {self.done} finishes with them"
                    raise GatesError(
                        f"{when}: {error}{f'; {kept}' if self.done else ''}"
                    ) from error
                self._keep(step)
                tick()

    def _steps(self, cycle: Cycle, model: Remembering) -> Iterator[CycleStep]:
        """Yield the cycles that are missing, from the analyses on disk."""
        background, previous = self.first[None], None
        for number in range(max(self.done - _memory(self.parts.assimilator), 0), self.done):
            if number:
                background = self._forecast(model, number)
            self._recall(model, background, number)
        if self.done:
            previous = self._analysis(self.done - 1)[None]
            background = self._forecast(model, self.done)
        nothing = GriddedObservations.absent((1, *self.first.shape))
        yield from cycle.run(background[None], [nothing] * (len(self.times) - self.done), previous)

    def _forecast(self, model: Remembering, number: int) -> Tensor:
        """Return the background (1,C,H,W) of a cycle, from the analyses before it."""
        before = self._analysis(number - 2) if number > 1 else None
        return advance(model, self._analysis(number - 1), self.parts.hours, before)

    def _recall(self, model: Remembering, background: Tensor, number: int) -> None:
        """Let a method that remembers its analyses remember one of them again."""
        counts = self.parts.reports.state()
        seen = self.parts.reports.against(
            model, self.times[number], background[0], self.parts.hours
        )
        self.parts.reports.restore(counts)
        history = getattr(self.parts.assimilator, "history", None)
        if isinstance(history, AnalysisHistory) and bool(seen.mask.any()):
            history.remember(self._analysis(number)[None], seen, history.ages(background[None]))

    def _analysis(self, number: int) -> Tensor:
        """Return an analysis (1,C,H,W) from disk."""
        return self.analyses.read_states(self.channels, (number,))[None]

    def _observed(self, model: Remembering, background: Tensor) -> GriddedObservations:
        reports = self.parts.reports
        seen = reports.against(model, self.times[self.done], background[0], self.parts.hours)
        if not self.done:
            reports.require_plausible()
        return seen

    def _check(self, step: CycleStep) -> None:
        """Refuse states that are not finite or have left the climate."""
        mean = self.parts.units.mean.to(step.analysis)[:, None, None]
        sd = self.parts.units.std.to(step.analysis)
        for what, states in (("background", step.background), ("analysis", step.analysis)):
            away = states[0, 0] - mean
            if not bool(diverged(away, sd, self.parts.limit)):
                continue
            size = away.square().mean((-2, -1)).sqrt() / sd
            worst = int(torch.where(size.isfinite(), size, torch.inf).argmax())
            raise GatesError(
                f"the {what} has diverged: {self.channels.labels[worst]} departs from its mean by "
                f"{float(size[worst]):.3g} standard deviations, expected at most "
                f"{self.parts.limit:g}; check units, weights and errors"
            )

    def _keep(self, step: CycleStep) -> None:
        """Write one cycle, and then that it is there."""
        for store, states in ((self.backgrounds, step.background), (self.analyses, step.analysis)):
            store.write_states(states[0, 0], self.channels, (self.done,))
        rows = "".join(map(_line, self._rows(step)))
        with (self.partial.content / DEPARTURES).open("a", encoding="utf-8") as file:
            file.write(rows)
        self.done += 1
        self._save()

    def _save(self) -> None:
        size = (self.partial.content / DEPARTURES).stat().st_size
        self.partial.save(
            {"cycles": self.done, "bytes": size, "reports": self.parts.reports.state()}
        )

    def _rows(self, step: CycleStep) -> Iterator[tuple[str, ...]]:
        """Yield what the observations of a cycle say of background and analysis."""
        sums = DepartureSums.of(step.background[:, 0], step.analysis[:, 0], step.observations)
        observed, passed = self.parts.reports.latest.tolist()
        stamp = np.datetime_as_string(self.times[self.done], unit="m")
        figures = (sums.background_bias(), sums.background_rms(),
                   sums.analysis_bias(), sums.analysis_rms())  # fmt: skip
        for channel, label in enumerate(self.channels.labels):
            numbers = [float(figure[channel]) for figure in figures]
            shown = [f"{number:.9g}" if passed[channel] else "" for number in numbers]
            used = passed[channel]
            yield (stamp, label, str(used), str(observed[channel] - used), *shown)

    def finish(self, attributes: Mapping[str, Any]) -> None:
        """Add to both stores what was used."""
        reports = self.parts.reports
        for store in (self.analyses, self.backgrounds):
            store.set_attributes({**attributes, **reports.counts()})


def _memory(assimilator: Assimilator) -> int:
    """Return of how many cycles a method remembers something, with those that it is known from."""
    history = getattr(assimilator, "history", None)
    return history.length + 1 if isinstance(history, AnalysisHistory) else 0


def _line(cells: tuple[str, ...]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()
