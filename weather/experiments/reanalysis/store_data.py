"""A user's store and all that is made of it: cache, backgrounds, statistics, climatology."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core_gates.errors import GatesError
from harness.files import Data, short_digest, write_json
from weather.data.axes import dataset_grid
from weather.data.climatology import (
    DAYS,
    WINDOW_DAYS,
    Calendar,
    root_mean_square_difference,
    write_climatology,
)
from weather.data.store import naming, open_wb2, store_channels
from weather.data.training_cache import FrameCache, Layout, same_identity, store_frames, write_cache
from weather.data.writing import differences
from weather.experiments.reanalysis.periods import (
    Background,
    FindModel,
    ForecastStore,
    model_frames,
    split_times,
)
from weather.observations.report_table import observation_error
from weather.progress import Progress, silent
from weather.state import Normalizer

TRUTH, BACKGROUND = "truth.zarr", "background.zarr"
CLIMATOLOGY, ERRORS = "climatology.zarr", "background_error.json"
PERIODS = ("training", "validation", "held_out")


class ReanalysisData:
    """Truth and backgrounds of a user's store, see `.source.ReanalysisSource`.

    Attributes:
        find_model: Returns a forecast model by its name; needed for backgrounds of a model while
            they are made.
    """

    find_model: FindModel | None = None

    def __init__(
        self,
        store: str | None,
        background: str,
        lead_hours: float | None,
        variables: Sequence[str],
        levels: Sequence[int],
        validation: Sequence[str | int],
        held_out: Sequence[str | int],
        gap_days: float,
        error_sd: Mapping[str, float] | None,
        cache: str | None,
    ) -> None:
        if store is None:
            raise GatesError(
                "no store was given, expected one in the schema of WeatherBench 2: add "
                "--data.store X.zarr"
            )
        self.store_path = store
        self.channels = store_channels(store, variables, levels)
        with open_wb2(store, self.channels) as dataset, naming(store):
            for name in ("number", "prediction_timedelta"):
                if name in dataset.dims:
                    raise GatesError(
                        f"has the dimension {name}, expected one state a time: select one entry, "
                        "or give it as --data.background"
                    )
            self.grid = dataset_grid(dataset)
            self.times = dataset["time"].values.astype("datetime64[s]")
        self.background = Background.of(background, lead_hours)
        self.periods = split_times(self.times, validation, held_out, gap_days)
        self.forecasts = None
        if self.background.kind == "store":
            self.forecasts = ForecastStore(self.background, self.channels, self.grid)
        self.folder = None if cache is None else Path(cache)
        self.stated_error = dict(error_sd or {})
        self._require_pairs()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what lives in this process alone."""
        return {name: value for name, value in vars(self).items() if name != "find_model"}

    # --- which background belongs to which truth

    @cached_property
    def cached_times(self) -> np.ndarray:
        """Positions of the truth for which a background is cached, ascending."""
        if self.forecasts is not None:
            return np.flatnonzero(np.isin(self.times, self.forecasts.times))
        return np.flatnonzero(self.background.starts(self.times, self._roles) >= 0)

    @cached_property
    def _roles(self) -> np.ndarray:
        roles = np.full(len(self.times), -1)
        for number, positions in enumerate(self.periods):
            roles[positions] = number
        return roles

    def pairs(self, period: str) -> tuple[np.ndarray, np.ndarray]:
        """Return positions (N,) of truths, and of their backgrounds in `backgrounds`."""
        positions: np.ndarray = getattr(self.periods, period)
        if self.background.kind == "earlier":
            starts = self.background.starts(self.times, self._roles)[positions]
            return positions[starts >= 0], starts[starts >= 0]
        there = np.isin(positions, self.cached_times)
        return positions[there], np.searchsorted(self.cached_times, positions[there])

    def _require_pairs(self) -> None:
        """Refuse a store of which a period has no truth with its background."""
        for period in PERIODS:
            if len(self.pairs(period)[0]):
                continue
            steps = np.diff(self.times) / np.timedelta64(1, "h")
            step = f"{np.median(steps):g} h apart" if len(steps) else "one alone"
            raise GatesError(
                f"no time of {period} has a background ({self.background.name}): {self.store_path} "
                f"has {len(self.times)} times, {step}: give a --data.background at its times, or a "
                "store of more times"
            )

    # --- what is made

    @property
    def paths(self) -> dict[str, Path]:
        """Files of the training cache by the name of their content.

        Raises:
            GatesError: There is no folder for it.
        """
        if self.folder is None:
            raise GatesError("no folder for the training cache: add --data.cache FOLDER")
        names = [TRUTH, BACKGROUND, ERRORS, CLIMATOLOGY]
        if self.background.kind == "earlier":
            names.remove(BACKGROUND)
        return {name: self.folder / name for name in names}

    @cached_property
    def sources(self) -> list[Data]:
        """The store of the truth, and that of the backgrounds if there is one."""
        described = [_described(self.store_path, "truth", self.times)]
        if self.forecasts is not None:
            described.append(_described(self.background.name, "background", self.forecasts.times))
        return described

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the cache is made of."""
        return {
            "store": self.sources[0].sha256[:16],
            "channels": ", ".join(self.channels.labels),
            "periods": short_digest([positions.tolist() for positions in self.periods]),
            "background": self.background.name if self.forecasts is None
            else self.sources[1].sha256[:16],
            "hours": self.background.hours,
        }  # fmt: skip

    def make(self, folder: Path, progress: Progress = silent) -> Iterator[Path]:  # noqa: ARG002
        """Write what is missing, and yield each file or folder when it is complete."""
        for name, path in self.paths.items():
            if path.exists():
                self._require_own(name, path)
            else:
                with _without_trace(path.parent):
                    self._make(name, path, progress)
            yield path

    def prepare(self, progress: Progress = silent) -> None:
        """Write what is missing for training: all but the climatology."""
        for path in self.make(Path(), progress):
            if path.name == ERRORS:
                return

    def make_truth(self, progress: Progress = silent) -> None:
        """Write what is missing."""
        list(self.make(Path(), progress))

    def check(self) -> None:
        """Refuse a cache that was made of something else."""
        for name, path in self.paths.items():
            if path.exists():
                self._require_own(name, path)

    def _make(self, name: str, path: Path, progress: Progress) -> None:
        if name == TRUTH:
            layout = Layout(self.channels, self.grid, self.times, self.identity)
            with (
                open_wb2(self.store_path, self.channels) as dataset,
                naming(self.store_path),
                progress("caching the store", len(self.times)) as tick,
            ):
                frames = store_frames(dataset, self.channels)
                write_cache(
                    path, layout, frames, statistics_of=self.periods.training.tolist(), tick=tick
                )
        elif name == BACKGROUND:
            times = self.times[self.cached_times]
            layout = Layout(self.channels, self.grid, times, self.identity)
            with progress("caching backgrounds", len(times)) as tick:
                write_cache(path, layout, self._background_frames(), tick=tick)
        elif name == ERRORS:
            background_sd = root_mean_square_difference(
                self.truth.frames,
                self.backgrounds.frames,
                self.grid.area_weights(),
                self.pairs("training"),
            )
            write_json(path, {"identity": self.identity, "background_sd": background_sd.tolist()})
        else:
            hours = Calendar.of(self.times[self.periods.training]).hours
            with progress("climatology", DAYS * len(hours)) as tick:
                write_climatology(
                    path, self.truth.frames, self.channels, self.grid, self.times,
                    self.periods.training, window_days=WINDOW_DAYS,
                    attributes={"identity": json.dumps(self.identity)}, tick=tick,
                )  # fmt: skip

    def _background_frames(self) -> Iterator[Tensor]:
        if self.forecasts is not None:
            order = np.searchsorted(self.forecasts.times, self.times[self.cached_times])
            return self.forecasts.frames(order.tolist())
        if self.find_model is None:
            raise GatesError(
                f"--data.background {self.background.name!r} is neither hours such as 24h nor a "
                "store (.zarr, .nc): give one of them, or a forecast model on the command line"
            )
        starts = self.background.starts(self.times, self._roles)[self.cached_times]
        assert self.background.hours is not None
        return model_frames(
            self.find_model(self.background.name),
            self.truth,
            starts.tolist(),
            self.background.hours,
        )

    def _require_own(self, name: str, path: Path) -> None:
        """Refuse what was made of something else, or was damaged.

        Raises:
            GatesError: The message lists what differs.
        """
        if name == ERRORS:
            identity = _read_errors(path)["identity"]
        elif name == CLIMATOLOGY:
            identity = _climatology_identity(path)
        else:
            identity = FrameCache(path).identity
        if not same_identity(identity, self.identity):
            said = differences(json.dumps(identity), json.dumps(self.identity))
            raise GatesError(
                f"{path} was made of other data or periods ({said}): delete it, or give another "
                "folder by --data.cache"
            )

    # --- what is read

    def setup(self) -> None:
        """Read the statistics.

        Raises:
            GatesError: They are missing or damaged.
        """
        _ = self.normalizer, self.background_sd

    @cached_property
    def truth(self) -> FrameCache:
        """The states of the store."""
        return FrameCache(self.paths[TRUTH])

    @cached_property
    def backgrounds(self) -> FrameCache:
        """The states that backgrounds are taken from; the truth if they are earlier states."""
        return (
            self.truth if self.background.kind == "earlier" else FrameCache(self.paths[BACKGROUND])
        )

    @cached_property
    def background_times(self) -> np.ndarray:
        """Times (N,) that have a background, whatever their period."""
        if self.background.kind == "earlier":
            return self.times[self.background.starts(self.times) >= 0]
        return self.times[self.cached_times]

    def background_states(self, times: np.ndarray) -> Tensor:
        """Return the backgrounds (N,C,H,W) of some of `background_times`."""
        if self.background.kind == "earlier":
            places = self.background.starts(self.times)[np.searchsorted(self.times, times)]
        else:
            places = np.searchsorted(self.times[self.cached_times], times)
        return torch.stack([self.backgrounds[int(place)] for place in places])

    @cached_property
    def normalizer(self) -> Normalizer:
        """Mean and standard deviation of every channel in the training period."""
        return self.truth.normalizer()

    @cached_property
    def background_sd(self) -> Tensor:
        """Root mean square (C,) of the background error in the training period."""
        return torch.tensor(_read_errors(self.paths[ERRORS])["background_sd"])

    @cached_property
    def observation_error(self) -> Tensor:
        """Standard deviations (C,) of simulated observations, those of real reports by default.

        Where none are known, half the background error; never more than the field varies.

        Raises:
            GatesError: ``error_sd`` names no variable, or a number that is not positive.
        """
        names = (*self.channels.surface, *self.channels.upper)
        given = self.stated_error
        if set(given) - set(names) or not all(0 < value < torch.inf for value in given.values()):
            raise GatesError(
                f"error_sd {given} cannot be used: give positive numbers for {', '.join(names)}, "
                "or some of them"
            )
        errors = []
        for channel, (name, level) in enumerate(self.channels):
            pressure = np.asarray([np.nan if level is None else float(level)])
            usual = float(observation_error(name, pressure)[0])
            if not np.isfinite(usual):
                usual = float(self.background_sd[channel]) / 2
            errors.append(given.get(name, min(usual, float(self.normalizer.std[channel]))))
        return torch.tensor(errors)


@contextmanager
def _without_trace(folder: Path) -> Iterator[None]:
    """Remove folders that were made for something that failed."""
    new = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        yield
    except BaseException:
        for parent in new:
            with suppress(OSError):
                parent.rmdir()
        raise


def _described(path: str, role: str, times: np.ndarray) -> Data:
    """Describe a store by its content; one that is not local by its name and times."""
    if "://" not in path:
        return Data.of(Path(path).name, role, Path(path))
    return Data(
        path,
        role,
        short_digest([path, times.astype(int).tolist()], 64),
        len(times),
        "times",
        listing=True,
    )


def _read_errors(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        numbers = np.asarray(content["background_sd"], dtype=float)
        if not (np.isfinite(numbers) & (numbers > 0)).all():
            raise ValueError(f"the background error is {numbers.tolist()}")
        return dict(content) | {"identity": dict(content["identity"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GatesError(
            f"{path} cannot be used ({error}), expected positive background errors: delete it, so "
            "that it is made again; a background that is the truth itself has none"
        ) from error


def _climatology_identity(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(json.loads((path / ".zattrs").read_text())["identity"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GatesError(
            f"{path} is no climatology that was made here ({error}): delete it, so that it is made "
            "again"
        ) from error
