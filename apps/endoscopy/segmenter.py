"""Train the segmenter that is shipped: ``python -m apps.endoscopy.segmenter``.

It renders 700 polyps, trains on three frames of each and on random parts of them, and tells how
well the masks of 60 new polyps are found. The same command gives the same weights; it takes 25
minutes on one core. ``python -m harness.experiment.ship`` puts them into the package.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from endoscopy.segmentation.module import intersection_over_union, train_segmenter
from endoscopy.segmentation.rendered import rendered_masks
from endoscopy.segmentation.segmenter import SHIPPED, Segmenter, Segmenters
from harness.experiment import Job, Piece, Run

SIZE = 96  # pixels of a side that the segmenter works on
TEST_SEED, TEST_OBJECTS = 99, 60


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is missing, score it and tell where it is."""
    parser = argparse.ArgumentParser("python -m apps.endoscopy.segmenter", description=__doc__)
    parser.add_argument("--objects", type=int, default=700, help="rendered polyps")
    parser.add_argument("--frames", type=int, default=3, help="frames of each")
    parser.add_argument("--epochs", type=int, default=12, help="passes over all frames and parts")
    parser.add_argument("--seed", type=int, default=0, help="of everything")
    parser.add_argument("--root", type=Path, default=Path("runs"), help="folder of all runs")
    options = vars(parser.parse_args(arguments))
    configuration, kind, _ = SHIPPED
    folder = options.pop("root") / "endoscopy" / configuration
    run = Run(folder, app="endoscopy", config_path=Path(configuration), package="endoscopy")
    piece = run.piece("unet", options.pop("seed"), size=SIZE, **options)
    store = run.store(kind, Segmenters())
    run.obtain(store, [piece], train, ticks=piece["objects"] + piece["epochs"])
    whole, parts = rendered_scores(store.load(piece), TEST_OBJECTS)
    print(
        f"mean intersection over union of new polyps: {whole:.3f} whole frames, {parts:.3f} parts"
    )
    print(store.find(piece))
    return 0


def train(piece: Piece, job: Job) -> Segmenter:
    """Render polyps and train a segmenter on them."""
    images, masks = rendered_masks(
        piece["objects"], piece["frames"], seed=piece.seed or 0, size=piece["size"], tick=job.tick
    )
    return train_segmenter(
        images,
        masks,
        size=piece["size"],
        epochs=piece["epochs"],
        seed=piece.seed or 0,
        progress=lambda *_: job.tick(),
    )


@torch.no_grad()
def rendered_scores(segmenter: Segmenter, objects: int) -> tuple[float, float]:
    """Return the mean intersection over union on whole frames and on parts of new polyps."""
    images, masks = rendered_masks(objects, 2, seed=TEST_SEED, size=segmenter.size)
    found = torch.cat([segmenter(batch / 255.0)[:, 0] > 0 for batch in images.split(32)])
    scores = intersection_over_union(found, masks)
    return float(scores[0::2].mean()), float(scores[1::2].mean())


if __name__ == "__main__":
    sys.exit(main())
