"""The ridge of the likelihood, along which slope and temperature cannot be distinguished."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from harness.figures.style import SEQUENTIAL, colors_of, dress, head, new_figure, place
from studies.gaussian.gaussian_mixture import Array, drawn, likelihood
from studies.gaussian.rates import Case

FACTORS = np.exp2(np.linspace(-1, 1, 33))
"""By which slope and temperature are multiplied, 1 in the middle."""

LETTERS = {"beta1": "β1", "tau": "τ", "beta1_over_tau": "β1/τ", "a": "a", "b": "b", "nu": "ν"}
SHOWN = 0.1  # of the likelihood that is lost, the end of the scale
SIDE, GAP = 2.5, 0.85  # inches of a panel


def ridge_map(case: Case, num: int = 4000, seed: int = 0) -> Array:
    """Return the mean log-likelihood less that of the truth (slope, temperature).

    Args:
        case: Whose truth is disturbed: β1 by a factor of `FACTORS`, β0 and τ by another one,
            so that the diagonal is (λβ1, λβ0, λτ).
        num: Sample points.
        seed: Of the sample.
    """
    x, y = drawn(case.truth, num, case.activation, np.random.default_rng([seed]))
    likelihoods = [
        [likelihood(case.truth.scaled(s, t), x, y, case.activation).value for t in FACTORS]
        for s in FACTORS
    ]
    return np.array(likelihoods) - likelihood(case.truth, x, y, case.activation).value


def ridge_figure(maps: Mapping[str, Array]) -> Figure:
    """Draw what is lost of the likelihood, a panel for each activation.

    Args:
        maps: Activation -> `ridge_map`.
    """
    figure = new_figure(0.7 + len(maps) * (SIDE + GAP), SIDE + 1.5)
    for column, (name, lost) in enumerate(maps.items()):
        axes = place(figure, 0.7 + column * (SIDE + GAP), 0.6, SIDE, SIDE)
        axes.pcolormesh(FACTORS, FACTORS, np.clip(lost, -SHOWN, 0), cmap=SEQUENTIAL, vmin=-SHOWN,
                        vmax=0, shading="nearest", label=name)  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        dress(axes, title=name, x="factor of the temperature",
              y="" if column else "factor of the slope", grid=False)  # fmt: skip
    head(figure, "Likelihood around the truth", f"yellow: as likely as it; blue: {SHOWN} less")
    return figure


def rates_figure(medians: Mapping[str, Mapping[str, Array]], sizes: Array, start: str) -> Figure:
    """Draw median errors against the size of the sample, a panel for each activation.

    A dotted line falls with the root of the size.

    Args:
        medians: Activation -> error -> (S,).
        sizes: (S,).
        start: Where fits begin, for the title.
    """
    all_errors = [errors[error] for errors in medians.values() for error in LETTERS]
    limits = 0.7 * np.min(all_errors), 1.4 * np.max(all_errors)
    figure = new_figure(0.7 + len(medians) * (SIDE + GAP), SIDE + 1.8)
    for column, (name, errors) in enumerate(medians.items()):
        axes = place(figure, 0.7 + column * (SIDE + GAP), 0.6, SIDE, SIDE)
        colors = colors_of(LETTERS)
        for error, letter in LETTERS.items():
            axes.loglog(sizes, errors[error], color=colors[error], label=letter, marker="o", ms=3)
        axes.loglog(
            sizes, limits[1] / 2 * (sizes / sizes[0]) ** -0.5, ":", color="gray", label="$n^{-1/2}$"
        )
        axes.set_ylim(*limits)
        dress(axes, title=name, x="sample points", y="" if column else "median error")
    axes.legend(
        *axes.get_legend_handles_labels(), frameon=False, ncols=len(LETTERS) + 1, fontsize=8,
        loc="lower right", bbox_to_anchor=(1.0, 1.13), borderaxespad=0,
    )  # fmt: skip
    head(figure, f"Errors of the most likely mixture, {start}")
    return figure
