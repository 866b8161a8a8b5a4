"""Train the segmenter that is shipped: ``python -m apps.endoscopy.segmenter``.

It renders 700 polyps, trains on three frames of each and on random crops of them, and scores the
masks of 60 new polyps. The same command gives the same weights; it takes 25
minutes on one core. ``python -m harness.experiment.ship`` puts them into the package.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from endoscopy.segmenter import SHIPPED, Segmenter, Segmenters
from endoscopy.training.segmenter_module import rendered_masks, rendered_scores, train_segmenter
from harness.experiment import Job, Piece, Run

SIZE = 96  # pixels of a side that the segmenter works on
TEST_OBJECTS = 60


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is missing, score it and print its path."""
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


if __name__ == "__main__":
    sys.exit(main())
