"""The stop of studies on the tour: which gates have a ridge of equally likely temperatures."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from harness.report.page import Page, TourRow, TourStop
from studies.gaussian.rates import CASES
from studies.gaussian.ridge import ridge_figure, ridge_map

POINTS = 1000
FLAT, LOST = 1e-10, 1e-2


def tour(folder: Path, say: Callable[[str], None]) -> TourStop:
    """Map the likelihood of a Gaussian mixture of experts around the truth.

    Args:
        folder: For files; none are needed.
        say: Reports the progress.
    """
    del folder
    say("mapping the likelihood over slope and temperature")
    maps = {name: ridge_map(CASES[name], num=POINTS) for name in ("identity", "tanh")}
    flat = float(np.abs(np.diagonal(maps["identity"])).max())
    lost = float(-np.diagonal(maps["tanh"])[0])
    good = flat <= FLAT and lost >= LOST
    row = TourRow(
        "temperature of a gate",
        "log-likelihood lost where slope and temperature halve",
        f"tanh {lost:.3f}",
        f"identity {flat:.0e}",
        "only tanh can be estimated" if good else "not as published",
        good,
    )

    def draw(page: Page) -> None:
        page.text(
            "A softmax gate with a linear score divides its slope by its temperature: mixtures on "
            "a diagonal of the left map are the same one, and no sample can distinguish them. An "
            "activation before the temperature removes the ridge (arXiv 2401.13875)."
        )
        page.figure(ridge_figure(maps), f"{POINTS:,} points drawn from the truth.", name="ridge")

    return TourStop("Studies: training with gates", [row], draw)
