"""The first line of every report: the baselines, and whether the model beats them."""

from collections.abc import Sequence

import pandas as pd

from endoscopy.evaluation.scores import score_differences, score_intervals
from endoscopy.metrics import CONTINUOUS, TRUTH, CutOffs, count_on_cut_offs

SCORES = ("macro_f1", "mape")
Tables = pd.DataFrame | Sequence[pd.DataFrame]


def headline(
    model: Tables,
    constant: Tables,
    area: Tables,
    *,
    regression: Tables | None = None,
    name: str = "model",
    cut_offs: CutOffs = CONTINUOUS,
    resamples: int = 2000,
) -> str:
    """Summarize in one line what is reached without a network, and whether the model is better.

    The model is called significantly better than the constant only if both paired differences, in
    macro F1 and in MAPE, are significant and have the right sign.

    Args:
        model: Object table of the model, or one for each seed.
        constant: Object table of the constant baseline, same objects, or one for each seed.
        area: That of the area baseline.
        regression: That of a regression on the area and two brightnesses, where there is one.
        name: Of the model.
        cut_offs: Of the predictions.
        resamples: Number of bootstrap resamples.
    """
    parts = []
    others = [("constant", constant), ("area alone", area)]
    others += [("area and brightness", regression)] if regression is not None else []
    for title, one in (*others, (name, model)):
        scores = score_intervals(one, cut_offs, only=SCORES, resamples=resamples)
        f1, mape = scores["macro_f1"], scores["mape"]
        parts.append(f"{title}: macro F1 {f1.value:.3f} [{f1.low:.3f}, {f1.high:.3f}], "
                     f"MAPE {mape.value:.3f}")  # fmt: skip
    names = ("the constant", "the area", "the regression on area and brightness")
    verdicts = [
        f"{verdict(model, one, cut_offs=cut_offs, resamples=resamples)} than {title}"
        for title, (_, one) in zip(names, others, strict=False)
    ]
    return f"{'; '.join(parts)}; the {name} is {', '.join(verdicts[:-1])} and {verdicts[-1]}."


def verdict(
    model: Tables, baseline: Tables, *, cut_offs: CutOffs = CONTINUOUS, resamples: int = 2000
) -> str:
    """Return ``significantly better``, ``significantly worse`` or ``NOT significantly better``."""
    gaps = score_differences(model, baseline, cut_offs, only=SCORES, resamples=resamples)
    f1, mape = gaps["macro_f1"], gaps["mape"]
    if f1.significant and mape.significant:
        if mape.value < 0 < f1.value:
            return "significantly better"
        if f1.value < 0 < mape.value:
            return "significantly worse"
    return "NOT significantly better"


def cut_off_note(objects: pd.DataFrame, cut_offs: CutOffs) -> str:
    """Return which cut-offs were used and how many objects lie exactly on those of the truth."""
    on = count_on_cut_offs(objects["gt"].to_numpy(float))
    exact = ", ".join(f"{count} on {cut:g} mm" for cut, count in on.items())
    return (
        f"classes of the truth at {TRUTH}, of predictions at {cut_offs}; of {len(objects)} objects"
        f" {exact} exactly."
    )
