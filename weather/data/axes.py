"""Coordinates and values of a dataset in one form, or what is wrong with them."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from core_gates.errors import GatesError
from weather.grid import Grid
from weather.state import ChannelSpec
from weather.variables import GRAVITY, check_range, standard_height

BUDGET_BYTES = 64 * 2**20  # read of each variable
SAMPLED_TIMES = 3


def check_values(dataset: xr.Dataset, *, allow_missing: bool = False) -> xr.Dataset:
    """Sample the first, middle and last time of every variable and judge the values.

    About 64 MiB of a variable are read: one time step at least, and of large forecasts and
    ensembles the first and last lead and member. Problems elsewhere stay unseen, but
    `weather.data.axes.to_tensor` checks all that it reads for missing values.

    Args:
        dataset: Canonical axes.
        allow_missing: Accept missing values.

    Returns:
        The dataset; each variable carries the attribute ``missing_fraction``, the fraction of the
        sample that is not finite.

    Raises:
        GatesError: Without the name of the store; the caller adds it.
    """
    checked = {}
    for name, array in dataset.data_vars.items():
        if not (np.issubdtype(array.dtype, np.integer) or np.issubdtype(array.dtype, np.floating)):
            raise GatesError(f"{name} holds {array.dtype}, expected real numbers; convert it")
        values = _sample(array)
        finite = values[np.isfinite(values)]
        missing = 1.0 - finite.size / values.size
        if missing and not allow_missing:
            raise GatesError(
                f"{name} is missing (NaN) in {100 * missing:.3g} % of the values sampled; fill "
                "them or choose another period"
            )
        if finite.size:
            check_range(str(name), float(finite.min()), float(finite.max()))
        if name == "geopotential" and "level" in array.dims:
            _check_geopotential(array["level"].values, values, array.dims.index("level"))
        checked[name] = array.assign_attrs(missing_fraction=missing)
    return dataset.assign(checked)


def _sample(array: xr.DataArray) -> np.ndarray:
    times = array.sizes["time"]
    for name in ("number", "prediction_timedelta"):
        if name in array.dims and array.nbytes // times > BUDGET_BYTES:
            array = array.isel({name: [0, -1]})
    affordable = max(1, min(SAMPLED_TIMES, BUDGET_BYTES * times // max(array.nbytes, 1)))
    positions = np.unique(np.linspace(0, times - 1, affordable).astype(int))
    return np.stack([read_values(array.isel(time=position)) for position in positions])


def read_values(array: xr.DataArray) -> np.ndarray:
    """Return the values of an array that may still lie in a store.

    Raises:
        GatesError: A part of the store is damaged; without its name, which the caller adds.
    """
    try:
        return array.values
    except Exception as error:  # codecs raise errors of many types
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise GatesError(
            f"{array.name} cannot be read: {reason}; a chunk is damaged, copy the store again"
        ) from error


def _check_geopotential(levels: np.ndarray, values: np.ndarray, axis: int) -> None:
    """Tell geopotential from geopotential height by the standard atmosphere at 100-850 hPa."""
    for position, level in enumerate(levels):
        height = float(standard_height(level))
        fields = np.take(values, position, axis)
        mean = float(fields[np.isfinite(fields)].mean()) if np.isfinite(fields).any() else 0.0
        if 100 <= level <= 850 and 0.7 * height < mean < 1.3 * height:
            raise GatesError(
                f"geopotential at {level:g} hPa averages {mean:.6g}, expected about "
                f"{GRAVITY * height:.3g} m2 s-2; it looks like height in m: multiply by {GRAVITY}"
            )


DIMENSIONS = ("time", "prediction_timedelta", "number", "level", "latitude", "longitude")
ALIASES = {
    "time": ("valid_time", "init_time", "forecast_reference_time"),
    "prediction_timedelta": ("lead_time", "step"),
    "number": ("realization", "member", "ensemble"),
    "level": ("pressure_level", "isobaricInhPa", "plev", "lev"),
    "latitude": ("lat",),
    "longitude": ("lon",),
}


def rename_axes(dataset: xr.Dataset) -> xr.Dataset:
    """Give dimensions their canonical names, add a scalar time as one, drop those of size 1."""
    for name, aliases in ALIASES.items():
        if name in dataset.dims:
            continue
        alias = next((alias for alias in aliases if alias in dataset.dims), None)
        if alias is not None:
            if name in dataset.variables and dataset[name].dims == (alias,):
                dataset = dataset.swap_dims({alias: name})
            else:
                dataset = dataset.drop_vars(name, errors="ignore").rename({alias: name})
    if "time" in dataset.coords and dataset["time"].ndim == 0:
        dataset = dataset.expand_dims("time")
    single = [name for name, size in dataset.sizes.items() if size == 1 and name not in DIMENSIONS]
    return dataset.squeeze(single, drop=True)


def canonical_axes(dataset: xr.Dataset, *, drop_duplicate_times: bool = False) -> xr.Dataset:
    """Check every coordinate and sort it.

    Args:
        dataset: Dimensions under their canonical names.
        drop_duplicate_times: Keep the first of the fields that share a time.

    Returns:
        Times, levels and longitudes (0 to 360) ascending, latitudes descending.

    Raises:
        GatesError: Without the name of the store; the caller adds it.
    """
    for name in ("time", "latitude", "longitude"):
        if name not in dataset.dims:
            raise GatesError(_absent(dataset, name))
    if "number" in dataset.dims and "number" not in dataset.coords:
        dataset = dataset.assign_coords(number=np.arange(dataset.sizes["number"]))
    for name in DIMENSIONS:
        if name in dataset.dims:
            if name not in dataset.coords:
                raise GatesError(f"dimension {name} has no values; write its coordinate")
            if dataset.sizes[name] == 0:
                raise GatesError(f"{name} is empty; choose a period or a store with data")
    dataset = _canonical_times(dataset, drop_duplicate_times)
    for name, check in CHECKS.items():
        if name in dataset.dims:
            dataset = check(dataset)
    return dataset.drop_vars([name for name in dataset.coords if name not in DIMENSIONS])


def horizontal_axes(dataset: xr.Dataset) -> xr.Dataset:
    """Check and sort latitudes and longitudes alone, whatever the other dimensions are.

    Raises:
        GatesError: Without the name of the store; the caller adds it.
    """
    for name in ("latitude", "longitude"):
        if name not in dataset.dims:
            raise GatesError(_absent(dataset, name))
        if name not in dataset.coords:
            raise GatesError(f"dimension {name} has no values; write its coordinate")
        if dataset.sizes[name] == 0:
            raise GatesError(f"{name} is empty; choose a store with data")
        dataset = CHECKS[name](dataset)
    return dataset


def require_step(dataset: xr.Dataset, hours: float) -> None:
    """Raise unless the times follow each other every ``hours``."""
    times = dataset["time"].values
    steps = np.diff(times) / np.timedelta64(3_600_000_000_000, "ns")
    wrong = np.flatnonzero(steps != hours)
    if len(wrong):
        first = wrong[0]
        raise GatesError(
            f"{len(wrong)} of {len(steps)} time steps are not {hours:g} h, the first is "
            f"{steps[first]:g} h after {_stamp(times[first])}; select a period without gaps or "
            "another step"
        )


def level_positions(dataset: xr.Dataset, levels: Sequence[int]) -> list[int]:
    """Return the indices of the given level values in a dataset.

    Raises:
        GatesError: If one is missing.
    """
    stored = dataset["level"].values.tolist() if "level" in dataset.coords else []
    missing = [level for level in levels if level not in stored]
    if missing:
        raise GatesError(
            f"level {', '.join(map(str, missing))} is missing, found "
            f"{', '.join(f'{level:g}' for level in stored) or 'none'}; choose levels that exist"
        )
    return [stored.index(level) for level in levels]


def _canonical_times(dataset: xr.Dataset, drop_duplicates: bool) -> xr.Dataset:
    times = dataset["time"].values
    if not np.issubdtype(times.dtype, np.datetime64):
        raise GatesError(
            f"time holds {times.dtype} ({times[0]}), expected dates of the standard calendar; set "
            "its attributes 'units' (\"hours since 1970-01-01\") and 'calendar'"
        )
    if np.isnat(times).any():
        raise GatesError(f"{np.isnat(times).sum()} of {len(times)} times are NaT; drop them")
    times = times.astype("datetime64[ns]")
    dataset = dataset.assign_coords(time=times)
    unique, first = np.unique(times, return_index=True)
    if len(unique) < len(times) and not drop_duplicates:
        repeated = np.setdiff1d(np.arange(len(times)), first)
        raise GatesError(
            f"{len(repeated)} of {len(times)} times are duplicates, the first is "
            f"{_stamp(times[repeated[0]])}; drop them"
        )
    return dataset if np.array_equal(unique, times) else dataset.isel(time=first)


def _canonical_leads(dataset: xr.Dataset) -> xr.Dataset:
    leads = dataset["prediction_timedelta"].values
    if not np.issubdtype(leads.dtype, np.timedelta64):
        raise GatesError(
            f"prediction_timedelta holds {leads.dtype}, expected time differences; set its "
            "attribute 'units' (\"hours\")"
        )
    if np.isnat(leads).any() or (leads < np.timedelta64(0)).any():
        raise GatesError("prediction_timedelta holds NaT or negative leads; drop them")
    if len(np.unique(leads)) < len(leads):
        raise GatesError("prediction_timedelta repeats a lead; drop the duplicates")
    dataset = dataset.assign_coords(prediction_timedelta=leads.astype("timedelta64[ns]"))
    return _sorted(dataset, "prediction_timedelta", leads)


def _canonical_levels(dataset: xr.Dataset) -> xr.Dataset:
    levels = _numbers(dataset, "level")
    if (levels <= 0).any():
        raise GatesError(f"level holds {levels.min():g}, expected positive levels; correct it")
    if len(np.unique(levels)) < len(levels):
        raise GatesError(f"level repeats a value in {_listed(levels)}; drop the duplicates")
    if levels.max() > 2000:
        raise GatesError(
            f"level reaches {levels.max():g}, expected hPa; it looks like Pa: divide by 100"
        )
    if np.array_equal(levels, np.rint(levels)):
        dataset = dataset.assign_coords(level=levels.astype(np.int64))
    return _sorted(dataset, "level", levels)


def _canonical_latitudes(dataset: xr.Dataset) -> xr.Dataset:
    latitude = _numbers(dataset, "latitude")
    if np.abs(latitude).max() > 90:
        raise GatesError(
            f"latitude reaches {latitude[np.abs(latitude).argmax()]:g}, expected degrees from -90 "
            "to 90; correct it"
        )
    steps = np.diff(latitude)
    if not ((steps > 0).all() or (steps < 0).all()):
        raise GatesError(
            f"latitude is not monotonic ({_listed(latitude)}); sort the fields by latitude"
        )
    if 90 - np.abs(latitude[[0, -1]]).min() > 1.01 * np.abs(steps).max(initial=0.0):
        radians = np.abs(latitude).max() < 1.58
        raise GatesError(
            f"latitude covers {latitude.min():g} to {latitude.max():g} degrees only, expected a "
            f"global grid; {'convert the radians' if radians else 'choose a global store'}"
        )
    return _sorted(dataset.assign_coords(latitude=latitude), "latitude", -latitude)


def _canonical_longitudes(dataset: xr.Dataset) -> xr.Dataset:
    given = _numbers(dataset, "longitude")
    if given.min() < -180 or given.max() > 360:
        raise GatesError(
            f"longitude covers {given.min():g} to {given.max():g}, expected degrees from 0 to 360 "
            "or from -180 to 180; correct it"
        )
    longitude = given % 360
    ordered = np.sort(longitude)
    steps = np.diff(np.append(ordered, ordered[0] + 360))
    if (steps == 0).any():
        raise GatesError(
            f"longitude {ordered[steps == 0][0]:g} occurs twice ({_listed(given)}); drop the "
            "repeated meridian"
        )
    if steps.max() > 1.5 * np.median(steps) or len(ordered) == 1:
        raise GatesError(
            f"longitude covers {_listed(given)} with a gap of {steps.max():g} degrees, expected a "
            "global grid; choose a global store"
        )
    return _sorted(dataset.assign_coords(longitude=longitude), "longitude", longitude)


CHECKS: dict[str, Callable[[xr.Dataset], xr.Dataset]] = {
    "prediction_timedelta": _canonical_leads,
    "level": _canonical_levels,
    "latitude": _canonical_latitudes,
    "longitude": _canonical_longitudes,
}


def _absent(dataset: xr.Dataset, name: str) -> str:
    dimensions = ", ".join(map(str, dataset.dims)) or "none"
    if name == "time" and {"hour", "dayofyear"} <= set(dataset.dims):
        return "is a climatology (hour, dayofyear), expected a dimension time; name a time series"
    if name in dataset.variables and dataset[name].ndim > 1:
        return (
            f"{name} has the dimensions {', '.join(map(str, dataset[name].dims))}, expected rows "
            "and columns of a latitude-longitude grid; regrid it"
        )
    aliases = ", ".join(ALIASES[name])
    return f"has no dimension {name} (or {aliases}), found {dimensions}; rename or add it"


def _numbers(dataset: xr.Dataset, name: str) -> np.ndarray:
    values = dataset[name].values
    if not np.issubdtype(values.dtype, np.number):
        raise GatesError(f"{name} holds {values.dtype}, expected numbers; convert it")
    if not np.isfinite(values).all():
        raise GatesError(f"{name} holds NaN or infinity; drop those entries")
    return values.astype(np.float64)


def _sorted(dataset: xr.Dataset, name: str, key: np.ndarray) -> xr.Dataset:
    """Sort along a dimension by ``key``, by a slice where possible, which keeps reads cheap."""
    order = np.argsort(key, kind="stable")
    if np.array_equal(order, np.arange(len(key))):
        return dataset
    if np.array_equal(order[::-1], np.arange(len(key))):
        return dataset.isel({name: slice(None, None, -1)})
    return dataset.isel({name: order})


def _listed(values: np.ndarray) -> str:
    shown = [f"{value:g}" for value in values]
    return ", ".join(shown if len(shown) <= 5 else [*shown[:3], "...", shown[-1]])


def _stamp(time: np.datetime64) -> str:
    return np.datetime_as_string(time, unit="m").replace("T", " ")


LEADING = ("time", "prediction_timedelta", "number")


def to_tensor(dataset: xr.Dataset, channels: ChannelSpec, *, allow_missing: bool = False) -> Tensor:
    """Stack the fields of a dataset into channels, reading levels by their value.

    Only what is asked for is read; select times before the call.

    Args:
        dataset: Dimensions among time, prediction_timedelta, number, level, latitude, longitude
            in any order.
        channels: Variables and levels, in the order of the result.
        allow_missing: Leave missing values as NaN instead of refusing them.

    Returns:
        float32 (T[, lead][, N], C, H, W), one leading dimension for each that the dataset has.

    Raises:
        GatesError: If a variable, a level or a value is missing, or a part of the store is damaged;
            without the name of the store, see `weather.data.store.naming`.
    """
    missing = [name for name in (*channels.surface, *channels.upper) if name not in dataset]
    if missing:
        raise GatesError(
            f"variable {', '.join(missing)} is missing, found "
            f"{', '.join(sorted(map(str, dataset.data_vars)))}; choose channels that exist"
        )
    leading = [name for name in LEADING if name in dataset.dims]
    sizes = tuple(dataset.sizes[name] for name in leading)
    shape = (*sizes, dataset.sizes["latitude"], dataset.sizes["longitude"])
    fields = [
        np.broadcast_to(read_values(_ordered(dataset[name], leading)), shape)
        for name in channels.surface
    ]
    if channels.upper:
        positions = level_positions(dataset, channels.levels)
        for name in channels.upper:
            array = read_values(_ordered(dataset[name].isel(level=positions), [*leading, "level"]))
            fields += [array[..., index, :, :] for index in range(len(positions))]
    stacked = np.stack(fields, axis=len(leading)).astype(np.float32, copy=False)
    if not allow_missing:
        _require_finite(stacked, channels)
    return torch.from_numpy(stacked)


def dataset_grid(dataset: xr.Dataset) -> Grid:
    """Return the grid of a dataset."""
    coordinates = (dataset[name].values.astype(np.float64) for name in ("latitude", "longitude"))
    return Grid(*map(torch.from_numpy, coordinates))


def to_dataset(
    states: Tensor,
    channels: ChannelSpec,
    grid: Grid,
    *,
    times: np.ndarray,
    leads: np.ndarray | None = None,
) -> xr.Dataset:
    """Label states with WeatherBench-2 names; the inverse of `to_tensor`.

    Args:
        states: (T[, lead][, N], C, H, W).
        channels: The C channels.
        grid: The H latitudes and W longitudes.
        times: (T,) datetime64, the analysis or initial times.
        leads: (lead,) timedelta64 if the states are forecasts.

    Raises:
        ValueError: If the shape and the coordinates disagree.
    """
    leading = ["time"] + (["prediction_timedelta"] if leads is not None else [])
    if states.ndim == len(leading) + 4:
        leading.append("number")
    expected = (channels.num_channels, *grid.shape)
    if states.ndim != len(leading) + 3 or tuple(states.shape[-3:]) != expected:
        raise ValueError(
            f"states have shape {tuple(states.shape)}, expected ({', '.join(leading)}, *{expected})"
        )
    coordinates: dict[str, np.ndarray | Sequence[int]] = {
        "time": np.asarray(times, dtype="datetime64[ns]"),
        "latitude": grid.latitude.numpy(),
        "longitude": grid.longitude.numpy(),
    }
    if leads is not None:
        coordinates["prediction_timedelta"] = np.asarray(leads, dtype="timedelta64[ns]")
    if "number" in leading:
        coordinates["number"] = np.arange(states.shape[len(leading) - 1])
    surface, upper = channels.split(states.detach().cpu().float())
    horizontal = ("latitude", "longitude")
    variables = {
        name: ((*leading, *horizontal), surface[..., index, :, :].numpy())
        for index, name in enumerate(channels.surface)
    }
    if channels.upper:
        coordinates["level"] = np.asarray(channels.levels, dtype=np.int64)
        for index, name in enumerate(channels.upper):
            variables[name] = ((*leading, "level", *horizontal), upper[..., index, :, :, :].numpy())
    return xr.Dataset(variables, coordinates)


def _require_finite(fields: np.ndarray, channels: ChannelSpec) -> None:
    missing = ~np.isfinite(fields)
    if missing.any():
        shares = np.moveaxis(missing, -3, 0).reshape(channels.num_channels, -1).mean(axis=1)
        worst = int(shares.argmax())
        raise GatesError(
            f"{channels.labels[worst]} is missing (NaN) in {100 * shares[worst]:.3g} % of the "
            "values read; fill them or choose another period"
        )


def _ordered(array: xr.DataArray, leading: Sequence[str]) -> xr.DataArray:
    """Return the array with its dimensions in canonical order, absent ones as size 1."""
    order = (*leading, "latitude", "longitude")
    return array.expand_dims([name for name in order if name not in array.dims]).transpose(*order)
