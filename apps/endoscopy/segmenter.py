"""Train the segmenter that is shipped: ``python -m apps.endoscopy.segmenter``.

It renders 700 polyps, trains on three frames of each and on random parts of them, tells how well
the masks of 60 new polyps are found, and writes ``endoscopy/weights/segmenter.safetensors``. The
same command gives the same weights; it takes 25 minutes on one core.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import torch

from apps.endoscopy.training import WEIGHTS
from apps.endoscopy.weights import SEGMENTER
from endoscopy.segmentation.module import intersection_over_union, train_segmenter
from endoscopy.segmentation.rendered import rendered_masks
from endoscopy.segmentation.segmenter import Segmenter
from harness.runs.ticker import counting, ticking

SIZE = 96  # pixels of a side that the segmenter works on
TEST_SEED, TEST_OBJECTS = 99, 60


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, score and write."""
    parser = argparse.ArgumentParser("python -m apps.endoscopy.segmenter", description=__doc__)
    parser.add_argument("--objects", type=int, default=700, help="rendered polyps")
    parser.add_argument("--frames", type=int, default=3, help="frames of each")
    parser.add_argument("--epochs", type=int, default=12, help="passes over all frames and parts")
    parser.add_argument("--seed", type=int, default=0, help="of everything")
    shipped = Path(str(files("endoscopy"))) / WEIGHTS / SEGMENTER
    parser.add_argument("--output", type=Path, default=shipped, help="file to write")
    options = parser.parse_args(arguments)
    with ticking("rendering", options.objects) as tick:
        images, masks = rendered_masks(
            options.objects, options.frames, seed=options.seed, size=SIZE, tick=tick
        )
    with counting("training") as count:
        segmenter = train_segmenter(
            images,
            masks,
            size=SIZE,
            epochs=options.epochs,
            seed=options.seed,
            progress=lambda epoch, _: count(epoch + 1, options.epochs),
        )
    segmenter.save(options.output)
    whole, parts = rendered_scores(segmenter, TEST_OBJECTS)
    print(
        f"mean intersection over union of new polyps: {whole:.3f} whole frames, {parts:.3f} parts"
    )
    print(options.output)
    return 0


@torch.no_grad()
def rendered_scores(segmenter: Segmenter, objects: int) -> tuple[float, float]:
    """Return the mean intersection over union on whole frames and on parts of new polyps."""
    images, masks = rendered_masks(objects, 2, seed=TEST_SEED, size=segmenter.size)
    found = torch.cat([segmenter(batch / 255.0)[:, 0] > 0 for batch in images.split(32)])
    scores = intersection_over_union(found, masks)
    return float(scores[0::2].mean()), float(scores[1::2].mean())


if __name__ == "__main__":
    sys.exit(main())
