"""Cues of many rendered objects under both exposures, for the ladder; frames are not kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd

from apps.endoscopy_rendering import MAIN, Rendering
from apps.endoscopy_training import Sizers, run_all
from apps.files import write_bytes
from apps.processes import Tick
from apps.ticker import ticking
from endoscopy.evaluation.features import frame_features
from endoscopy.evaluation.frames import Frames
from endoscopy.renderer.config import RendererConfig
from endoscopy.renderer.render import render_object

CHUNK = 25
SEED = 10  # added to that of the main set
Exposures = dict[str, pd.DataFrame]


def ladder_features(
    rendering: Rendering, sizers: Sizers, objects: tuple[int, int], folder: Path
) -> tuple[Exposures, Exposures]:
    """Return the cues of training and test frames by exposure, rendered once and then kept.

    Args:
        rendering: Looks of the objects; exposures are ``fixed`` and ``agc``.
        sizers: Whose data has the size of the frames.
        objects: Numbers of training and test objects.
        folder: Where cues are kept, chunk by chunk.
    """
    main = rendering.set(sizers.datamodule, MAIN).config
    chunks = [
        (replace(main, seed=main.seed + SEED, exposure=exposure), start)
        for start in range(0, sum(objects), CHUNK)
        for exposure in ("fixed", "agc")
    ]
    work = _Cues(folder / "cues", sum(objects))
    waiting = [one for one in chunks if not work.path(*one).is_file()]
    with ticking("rendering the ladder", len(waiting)) as tick:
        run_all(work, waiting, tick)
    train: Exposures = {}
    test: Exposures = {}
    for exposure in ("fixed", "agc"):
        parts = [pd.read_parquet(work.path(*one)) for one in chunks if one[0].exposure == exposure]
        table = pd.concat(parts, ignore_index=True)
        trains = table["unique_id"] < objects[0]
        train[exposure] = table[trains].reset_index(drop=True)
        test[exposure] = table[~trains].reset_index(drop=True)
    return train, test


class _Cues:
    """Render chunks of objects and keep their cues."""

    def __init__(self, folder: Path, total: int) -> None:
        self.folder, self.total = folder, total

    def path(self, config: RendererConfig, start: int) -> Path:
        """Return the file of a chunk."""
        stop = min(start + CHUNK, self.total)
        return self.folder / f"{config.exposure}-s{config.seed}-{start}-{stop}.parquet"

    def __call__(self, config: RendererConfig, start: int, *, tick: Tick) -> None:
        """Render a chunk."""
        stop = min(start + CHUNK, self.total)
        tables = [frame_features(_frames(config, index)) for index in range(start, stop)]
        content = pd.concat(tables, ignore_index=True).to_parquet(None, index=False)
        write_bytes(self.path(config, start), content)
        tick()


def _frames(config: RendererConfig, index: int) -> Frames:
    found = render_object(config, index)
    table = pd.DataFrame({"unique_id": [index] * config.frames, "gt": found.scene.size})
    return Frames(
        images=found.images.permute(0, 2, 3, 1).numpy(),
        masks=found.masks.numpy(),
        boxes=found.boxes.numpy().astype(float),
        table=table,
        depths=found.depths.numpy(),
    )
