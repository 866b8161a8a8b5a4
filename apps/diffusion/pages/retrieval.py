"""Which adapters captions lead to."""

from __future__ import annotations

import numpy as np

from apps.diffusion.studies.retrieval import METHODS, UNSEEN, searched_of, vectors
from apps.diffusion.world import World
from diffusion.data.concepts import concepts
from diffusion.evaluation.figures import retrieval_figure, retrieval_table
from harness.report.page import Page
from harness.runs.ticker import working


def add_retrieval(page: Page, world: World) -> None:
    """Add the matrix of captions and adapters, of the first encoder.

    Args:
        page: The report.
        world: In which nothing is trained.
    """
    page.section("Captions and adapters")
    names = [one.name for one in concepts()]
    trained = [name for name in names if name not in UNSEEN]
    second = world.zoo(1)
    found = world.encoders({"encoder": METHODS["encoder"]}, [0], concepts=trained).get("encoder")
    if not found or len(second) < len(names):
        page.text("The encoder or adapters of seed 1 are missing: run `evaluate` first.")
        return
    with working("encoding adapters"):
        searched = searched_of(world, second)
        scores = (searched.text @ vectors(found[0], searched.bundles).T).numpy()
    owners = np.array(searched.owners)
    means = np.stack([scores[owners == name].mean(0) for name in searched.names])
    page.figure(
        retrieval_figure(
            means,
            searched.names,
            searched.names,
            note=f"mean cosine; no encoder has seen {', '.join(UNSEEN)}",
        ),
        "Captions that no adapter has seen, by concept, and the adapters of an independent "
        "training run, known by their weights alone.",
        name="retrieval",
        table=retrieval_table(means, searched.names, searched.names),
    )
