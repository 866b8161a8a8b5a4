"""How often the model abstains, why, and what it gains."""

import numpy as np
import pandas as pd

from endoscopy.evaluation.scores import size_scores
from endoscopy.metrics import CONTINUOUS, CutOffs, object_table

SEPARATOR = ";"


def abstention_table(predictions: pd.DataFrame, *, cut_offs: CutOffs = CONTINUOUS) -> pd.DataFrame:
    """Tabulate abstentions of frames and of objects, all of whose frames abstain.

    Args:
        predictions: One row per frame with a column ``reasons``: empty, or reasons separated by
            semicolons.
        cut_offs: Of the predictions.

    Returns:
        Rows ``any`` and every reason, by number of frames, then ``accepted``. Columns reason,
        frames, frame_rate, objects, object_rate, and MAPE and macro F1 of those objects.
    """
    reasons = predictions["reasons"].fillna("").astype(str)
    lists = reasons.str.split(SEPARATOR).map(lambda parts: {p.strip() for p in parts} - {""})
    objects = object_table(predictions)
    every = predictions["unique_id"].to_numpy()
    counts = pd.Series([r for found in lists for r in found], dtype=str).value_counts()
    frames_of = {"any": (lists.map(len) > 0).to_numpy()} | {
        str(reason): lists.map(lambda found, r=reason: r in found).to_numpy()
        for reason in counts.index
    }
    abstained = set(objects.loc[objects["abstained"], "unique_id"])
    rows = []
    for reason, frames in frames_of.items():
        hit = objects["unique_id"].isin(abstained & set(every[frames])).to_numpy()
        rows.append(_row(reason, frames, objects, hit, cut_offs))
    accepted = ~objects["abstained"].to_numpy()
    rows.append(_row("accepted", ~frames_of["any"], objects, accepted, cut_offs))
    return pd.DataFrame(rows)


def _row(
    reason: str, frames: np.ndarray, objects: pd.DataFrame, hit: np.ndarray, cut_offs: CutOffs
) -> dict[str, object]:
    row = {
        "reason": reason,
        "frames": int(frames.sum()),
        "frame_rate": float(frames.mean()),
        "objects": int(hit.sum()),
        "object_rate": float(hit.mean()),
        "mape": float("nan"),
        "macro_f1": float("nan"),
    }
    if hit.any():
        scores = size_scores(objects[hit], cut_offs)(np.ones((1, int(hit.sum()))))
        row |= {name: float(scores[name][0]) for name in ("mape", "macro_f1")}
    return row
