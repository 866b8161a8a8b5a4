"""The baselines that need masks and depth, where a data set has them."""

import numpy as np
import pandas as pd

from endoscopy.evaluation.baselines import constant_size, fit_log_linear, fit_pinhole

REGRESSION = "mask area + photometry"
"""The regression on three numbers, which explain most of a rendered size."""

PHOTOMETRY = ("log_extent", "local_brightness", "frame_brightness")


def cue_baselines(train: pd.DataFrame, test: pd.DataFrame) -> dict[str, np.ndarray]:
    """Predict the test frames from hand-made cues.

    Args:
        train: :func:`endoscopy.evaluation.features.frame_features` of the training frames.
        test: The same of the test frames.

    Returns:
        Predicted sizes (N,) in mm of ``constant``; ``mask area``, a log-linear regression;
        ``mask area × depth``, a pinhole camera, where depth is known; ``mask area + photometry``,
        a log-linear regression on the area and the brightness of the lesion and of the frame.
    """
    gt, objects = train["gt"].to_numpy(float), train["unique_id"].to_numpy()
    result = {"constant": np.full(len(test), constant_size(train))}
    for name, cues in (("mask area", ("log_extent",)), (REGRESSION, PHOTOMETRY)):
        columns = list(cues)
        fit = fit_log_linear(train[columns].to_numpy(float), gt, objects)
        result[name] = fit.predict(test[columns].to_numpy(float))
    if train["log_depth"].notna().all() and test["log_depth"].notna().all():
        fitted, tested = (np.exp(one[["log_extent", "log_depth"]].to_numpy(float))
                          for one in (train, test))  # fmt: skip
        pinhole = fit_pinhole(fitted[:, 0], fitted[:, 1], gt)
        result["mask area × depth"] = pinhole.predict(tested[:, 0], tested[:, 1])
    return result
