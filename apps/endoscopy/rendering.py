"""Missing rendered sets are rendered on all cores; a killed rendering continues."""

from __future__ import annotations

from collections.abc import Sequence

from endoscopy.data.datamodule import PolypSizingDataModule
from endoscopy.experiments.rendered_sets import RenderedSet, Rendering
from endoscopy.renderer.dataset import claim_dataset, finish_dataset, write_objects
from harness.runs.processes import Tick, in_processes
from harness.runs.ticker import ticking

CHUNK = 20


def render(
    data: PolypSizingDataModule, rendering: Rendering, names: Sequence[str]
) -> list[RenderedSet]:
    """Render what is missing, and return the sets."""
    for one in rendering.missing(data, names):
        claim_dataset(one.folder, one.config, one.objects)
        starts = range(0, one.objects, CHUNK)
        chunks = [(one, start, min(start + CHUNK, one.objects)) for start in starts]
        with ticking(f"rendering {one.name}", one.objects) as tick:
            in_processes(write_chunk, chunks, tick)
        finish_dataset(one.folder, one.config, one.objects)
    return [rendering.set(data, name) for name in names]


def render_missing(data: PolypSizingDataModule, rendering: Rendering, names: Sequence[str]) -> None:
    """Announce and render the missing sets; do nothing for other kinds of data."""
    if "synthetic" not in data.sources:
        return
    missing = rendering.missing(data, names)
    if missing:
        sets = ", ".join(f"{one.name} of {one.objects} objects" for one in missing)
        print(f"rendered sets missing: {sets}; rendering them now", flush=True)
        render(data, rendering, names)


def write_chunk(one: RenderedSet, start: int, stop: int, *, tick: Tick) -> None:
    """Write some objects of a set."""
    for _ in write_objects(one.folder, one.config, range(start, stop)):
        tick()
