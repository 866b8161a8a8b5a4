from pathlib import Path

import numpy as np
import torch
from torch.testing import assert_close

from weather.metrics import fengwu_adas_acc, fengwu_adas_rmse

GOLDEN = Path(__file__).parents[2] / "golden" / "weather"


def test_golden():
    with np.load(GOLDEN / "adas_repo_metrics.npz") as file:
        v = {name: torch.from_numpy(file[name]) for name in file}
    exact = {"rtol": 0, "atol": 1e-10}
    assert_close(fengwu_adas_rmse(v["pred"], v["gt"], v["std"]), v["wrmse"], **exact)
    assert_close(fengwu_adas_acc(v["pred"], v["gt"], v["clim"]), v["wacc"], **exact)
