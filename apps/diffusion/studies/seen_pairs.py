"""Rivals that see drawings of the very pair which they combine, unlike gates."""

from __future__ import annotations

from functools import partial

import numpy as np

from apps.diffusion.studies.study import Comparison, Method
from apps.diffusion.works.seen_pairs import FITTING, seen_losses
from apps.diffusion.works.tasks import combinations
from harness.experiment import Arrays

PAIRS = "test2"
"""Of which combinations they are shown."""

SEEING = {"lorahub (sees the pair)": "lora_hub", "ziplora (sees the pair)": "zip_lora"}
"""Method -> rival."""


def losses_of_seeing(compared: Comparison) -> dict[str, list[np.ndarray]]:
    """Return method -> mean losses (P,) of the unseen pairs, after what is missing was fitted.

    A quick run fits nothing.
    """
    store = compared.run.store("losses", Arrays())
    pieces = [
        compared.piece(Method(name, rival, FITTING[rival]), PAIRS, None)
        for name, rival in SEEING.items()
    ]
    work = partial(seen_losses, **compared.places)
    made = compared.run.obtain(store, pieces, work, ticks=len(combinations(PAIRS)))
    return {
        piece.method: [np.nanmean(store.load(piece)["losses"].numpy(), axis=1)] for piece in made
    }
