import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

from endoscopy.evaluation.conformal import SplitConformal
from endoscopy.metrics import TRUTH, confusion_matrix, reliability
from endoscopy.plots import (
    bland_altman_figure,
    confusion_figure,
    ladder_figure,
    reliability_figure,
    size_figure,
    subgroup_figure,
)


def objects(count=200):
    draws = np.random.default_rng(0)
    gt = np.exp(draws.uniform(np.log(2), np.log(20), count))
    return pd.DataFrame(
        {"gt": gt, "predicted_mm": gt * np.exp(0.15 * draws.normal(size=count)),
         "censored": np.arange(count) < 5, "abstained": np.arange(count) % 20 == 7}
    )  # fmt: skip


def scored(names, column, **more):
    values = np.linspace(0.6, 0.9, len(names))
    table = {column: names}
    for score in ("macro_f1", "mape"):
        table |= {score: values, f"{score}_low": values - 0.05, f"{score}_high": values + 0.04}
    return pd.DataFrame(table | more)


def matrix():
    table = objects()
    return confusion_matrix(TRUTH.classes(table["gt"]), TRUTH.classes(table["predicted_mm"]))


def reliable():
    chances = np.random.default_rng(0).dirichlet([1, 1, 1], 500)
    return reliability(chances, chances.argmax(1))


FIGURES = {
    "bland-altman": lambda: bland_altman_figure(objects()),
    "sizes": lambda: size_figure(objects(), SplitConformal(tuple(np.linspace(-0.3, 0.3, 200)))),
    "confusion": lambda: confusion_figure(matrix()),
    "reliability": lambda: reliability_figure(reliable(), error=0.04),
    "ladder": lambda: ladder_figure(
        scored(
            ["constant", "area + local brightness, AGC"],
            "features",
            exposure=["fixed", "agc"],
            objects=3000,
            mape_published=0.3,
            macro_f1_published=0.7,
        )
    ),
    "subgroups": lambda: subgroup_figure(
        scored(["all", "flat", "Ip", "≤ 12"], "group", objects=[90, 40, 50, 3]).assign(
            mape=[0.1, 0.2, 0.1, np.nan], column=["all", "shape", "shape", "distance_mm"]
        )
    ),
}


@pytest.mark.parametrize("name", FIGURES)
def test_words_do_not_touch_and_lie_inside(name, legible):
    legible(FIGURES[name]())


def texts_of(figure):
    return [text.get_text() for text in figure.findobj(mpl.text.Text)]


def test_numbers_are_those_of_the_table():
    table = objects()
    exact = table[~table["censored"]]
    ratio = np.exp(np.log(exact["predicted_mm"] / exact["gt"]).mean())
    drawn = texts_of(FIGURES["bland-altman"]())
    assert f"mean ratio {ratio:.2f}" in drawn
    assert "195 objects, 5 lower bounds left out" in drawn
    assert "too few" in texts_of(FIGURES["subgroups"]())


@pytest.mark.fault("endoscopy C15")
def test_limits_of_agreement_are_those_of_ratios():
    draws = np.random.default_rng(1)
    gt = np.exp(draws.uniform(np.log(2), np.log(20), 4000))
    table = pd.DataFrame(
        {"gt": gt, "predicted_mm": gt * np.exp(0.1 + 0.2 * draws.normal(size=4000))}
    )
    (axes,) = bland_altman_figure(table).axes
    lines = sorted(float(line.get_ydata()[0]) for line in axes.lines)
    expected = np.exp([0.1 - 1.96 * 0.2, 0.0, 0.1, 0.1 + 1.96 * 0.2])
    np.testing.assert_allclose(lines, expected, rtol=0.02)
    assert axes.get_yscale() == "log"
    ratios = table["predicted_mm"] / table["gt"]
    for part in (ratios[gt < 4], ratios[gt > 10]):
        assert 0.93 < ((part > lines[0]) & (part < lines[-1])).mean() < 0.97
