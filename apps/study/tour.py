"""The stop of studies on the tour: ridges of equally likely temperatures, and spawned experts."""

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from core_gates.gates.dense_to_sparse import Combine
from harness.report.page import Page, TourRow, TourStop
from studies.evomoe.methods import VOCAB, Sizes, decoder_of
from studies.evomoe.spawning import spawning_changes
from studies.gaussian.rates import CASES
from studies.gaussian.ridge import ridge_figure, ridge_map

POINTS, FLAT, LOST, CHANGED = 1000, 1e-10, 1e-2, 1e-6
COMBINES: tuple[Combine, ...] = get_args(Combine)
SMALL = Sizes(context=32, dim=32, layers=2, hidden=64)


def tour(folder: Path, say: Callable[[str], None]) -> TourStop:
    """Map the likelihood of a Gaussian mixture around the truth, and spawn experts from one.

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
    )

    say("spawning experts")
    torch.manual_seed(0)
    model, tokens = decoder_of("evomoe", SMALL), torch.randint(VOCAB, (16, SMALL.context + 1))
    for weight in model.parameters():
        weight.data *= 3  # experts that matter
    hot, cold = (
        max(spawning_changes(model, tokens, combine=how, temperature=t, num_experts=8).values())
        for how, t in zip(COMBINES, SMALL.temperatures, strict=True)
    )
    spawned = TourRow(
        "experts spawned from one",
        "nats by which that changes the loss",
        f"Gumbel weights, temperature 2: {hot:.0e}",
        f"softmax weights, 0.3: {cold:.0e}",
        "the function is preserved" if hot < CHANGED else "the function is not preserved",
    )

    def draw(page: Page) -> None:
        page.figure(
            ridge_figure(maps),
            "Can the parameters of a gate be learned from data? How likely those are that lie "
            f"around the true ones, given {POINTS:,} points.",
            name="ridge",
        )
        page.text(
            "A softmax gate with a linear score divides its slope by its temperature: mixtures on "
            "a diagonal of the left map are the same one, and no sample can distinguish them. An "
            "activation before the temperature removes the ridge (arXiv 2401.13875)."
        )

    return TourStop("Studies: training with gates", [row, spawned], draw)
