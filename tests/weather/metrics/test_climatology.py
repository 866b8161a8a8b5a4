import numpy as np
import pytest
import torch

from weather.metrics import climatology_at

TABLE = torch.arange(4 * 366).view(4, 366, 1)


def test_days_count_from_the_first_of_january_in_every_year():
    times = np.array(
        ["2017-01-01T00", "2017-03-01T06", "2020-03-01T06", "2020-12-31T18"], "datetime64[ns]"
    )
    picked = climatology_at(TABLE, times)[:, 0].tolist()
    assert picked == [0, 366 + 59, 366 + 60, 3 * 366 + 365]


def test_an_hour_or_day_that_is_missing():
    with pytest.raises(ValueError, match=r"not \[3\]"):
        climatology_at(TABLE, np.array(["2017-01-01T03"], "datetime64[h]"))
    with pytest.raises(ValueError, match="366"):
        climatology_at(TABLE[:, :365], np.array(["2017-01-01"], "datetime64[D]"))
