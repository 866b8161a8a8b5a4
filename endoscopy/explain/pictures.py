"""Pictures of test objects in a report: their tracks with sizes, and saliency maps."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from core_gates.errors import GatesError
from endoscopy.bundles.contents import SizingBundle
from endoscopy.data.datamodule import PolypSizingDataModule
from endoscopy.evaluation.coverage import bounds
from endoscopy.explain.attention import GRAD_CAM, attention_maps
from endoscopy.explain.gate_bars import gate_figure
from endoscopy.explain.overlay import attention_figure
from endoscopy.explain.strip import Track, strip_figure
from endoscopy.metrics import TRUTH, object_table
from endoscopy.models import gates_of

SHOWN = 6
Captioned = tuple[Figure, str]


def picture_figures(
    frames: pd.DataFrame, bundle: SizingBundle, data: PolypSizingDataModule
) -> Iterator[Captioned]:
    """Yield strips of some test objects, an overlay and the gates.

    Args:
        frames: Predictions of the test frames.
        bundle: The network that made them.
        data: Loaded; pictures are left out where its frames cannot be read.
    """
    gates = gates_of(bundle.model)
    if gates:
        scores = {name: gate.scores().detach() for name, gate in gates.items()}
        yield gate_figure(scores), "Every feature of every gate, the most open ones first."
    examples = _examples(object_table(frames))
    try:
        rows = _rows(frames, examples, data)
        for example, of_object in rows.items():
            track = _track(frames[frames["unique_id"] == example], of_object, bundle, data)
            yield strip_figure(track), "Frames of a test object with the size read from each."
        yield _overlay([of_object[0] for of_object in rows.values()], bundle, data)
    except GatesError:  # the frames were moved, or the network has neither maps nor attention
        return


def _examples(objects: pd.DataFrame) -> list[str]:
    """Return the object with the median error of each class, and the one with the largest."""
    error = (np.log(objects["predicted_mm"]) - np.log(objects["gt"])).abs()
    classes = TRUTH.classes(objects["gt"])
    chosen = []
    for k in np.unique(classes):
        ordered = objects.loc[error[classes == k].sort_values().index, "unique_id"].to_list()
        chosen += [ordered[len(ordered) // 2], ordered[-1]]
    return list(dict.fromkeys(chosen))[:SHOWN]


def _rows(
    frames: pd.DataFrame, examples: list[str], data: PolypSizingDataModule
) -> dict[str, np.ndarray]:
    table = data.load().frames
    keys = table.set_index(["unique_id", "frame_id"]).index
    found = {}
    for example in examples:
        own = frames[frames["unique_id"] == example]
        wanted = own.set_index(["unique_id", "frame_id"]).index
        rows = np.asarray(keys.get_indexer(wanted))
        if (rows < 0).any():
            raise GatesError(f"the data has no object {example}: evaluate again")
        found[example] = rows
    return found


def _track(
    own: pd.DataFrame, rows: np.ndarray, bundle: SizingBundle, data: PolypSizingDataModule
) -> Track:
    source = data.frames()
    read = [source.sample(int(row)).frame for row in rows]
    sizes = own["predicted_mm"].to_numpy(float)
    reasons = own["reasons"].fillna("").tolist() if "reasons" in own else [""] * len(own)
    objects = object_table(own)
    low = high = float("nan")
    if bundle.conformal is not None:
        low, high = (float(bound[0]) for bound in bounds(objects, bundle.conformal))
    boxes = np.array([frame.box for frame in read])[:, [0, 2, 1, 3]]
    return Track(
        images=[frame.image for frame in read],
        boxes=boxes,
        sizes=sizes,
        reasons=reasons,
        size=float(objects["predicted_mm"].iloc[0]),
        low=low,
        high=high,
        calibrated=True,
        name=str(own["unique_id"].iloc[0]),
        truth=float(own["gt"].iloc[0]),
    )


def _overlay(rows: list[int], bundle: SizingBundle, data: PolypSizingDataModule) -> Captioned:
    """Return Grad-CAM of a ResNet, or the attention roll-out of a ViT."""
    source = data.frames()
    samples = [source.sample(int(row)) for row in rows]
    found = attention_maps(bundle, [sample.frame for sample in samples])
    if found is None:
        raise GatesError("the network has neither maps nor attention")
    maps, name = found
    images = [sample.frame.image for sample in samples]
    captions = [f"{sample.size_mm:.1f} mm" for sample in samples]
    title = name[0].upper() + name[1:]
    return attention_figure(images, list(maps), captions=captions, title=title), (
        "Where the network sees evidence for a larger lesion."
        if name == GRAD_CAM
        else "Attention roll-out to the token that the head reads."
    )
