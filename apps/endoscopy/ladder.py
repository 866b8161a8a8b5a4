"""Cues of many rendered objects under both exposures, for the ladder; frames are not kept."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pandas as pd

from apps.endoscopy.rendering import MAIN, Rendering
from apps.endoscopy.training import Sizers, run_all
from endoscopy.evaluation.rendered import rendered_features
from endoscopy.renderer.config import RendererConfig
from harness.files.atomic import write_bytes
from harness.runs.processes import Tick
from harness.runs.ticker import ticking

CHUNK = 25
SEED = 10  # added to that of the main set
Exposures = dict[str, pd.DataFrame]


def ladder_features(
    rendering: Rendering, sizers: Sizers, objects: tuple[int, int], folder: Path
) -> tuple[Exposures, Exposures]:
    """Return the cues of training and test frames by exposure, rendered once and then kept.

    Args:
        rendering: Looks of the objects; both exposures are rendered.
        sizers: Whose data has the size of the frames.
        objects: Numbers of training and test objects.
        folder: Where cues are kept, chunk by chunk.
    """
    main = rendering.set(sizers.datamodule, MAIN).config
    config = replace(main, seed=main.seed + SEED)
    parts = []
    for first, count in ((0, objects[0]), (objects[0], objects[1])):
        ends = [*range(first, first + count, CHUNK), first + count]
        parts.append([(config, *pair) for pair in pairwise(ends)])
    work = Cues(folder / "cues")
    waiting = [one for part in parts for one in part if not work.path(*one).is_file()]
    with ticking("rendering the ladder", len(waiting)) as tick:
        run_all(work, waiting, tick)
    tables = [pd.concat([pd.read_parquet(work.path(*one)) for one in part]) for part in parts]
    train, test = (
        {str(exposure): own.reset_index(drop=True) for exposure, own in table.groupby("exposure")}
        for table in tables
    )
    return train, test


class Cues:
    """Render chunks of objects and keep their cues.

    Args:
        folder: Where the files of chunks are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, config: RendererConfig, first: int, end: int) -> Path:
        """Return the file of a chunk, which belongs to all settings of the renderer."""
        settings = hashlib.sha256(repr(config).encode()).hexdigest()[:8]
        return self.folder / f"{settings}-{first}-{end}.parquet"

    def __call__(self, config: RendererConfig, first: int, end: int, *, tick: Tick) -> None:
        """Render a chunk."""
        found = rendered_features(config, range(first, end))
        table = pd.concat([cues.assign(exposure=name) for name, cues in found.items()])
        write_bytes(self.path(config, first, end), table.to_parquet(None, index=False))
        tick()
