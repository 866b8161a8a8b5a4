"""Reading the values of a dataset, and checking a few times for missing values and wrong units."""

import numpy as np
import xarray as xr

from core_gates.errors import GatesError
from weather.ranges import check_range
from weather.variables import GRAVITY, standard_height

BUDGET_BYTES = 64 * 2**20  # read of each variable
SAMPLED_TIMES = 3


def check_values(dataset: xr.Dataset, *, allow_missing: bool = False) -> xr.Dataset:
    """Sample the first, middle and last time of every variable and judge the values.

    About 64 MiB of a variable are read: one time step at least, and of large forecasts and
    ensembles the first and last lead and member. Problems elsewhere stay unseen, but
    `weather.data.tensors.to_tensor` checks all that it reads for missing values.

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
