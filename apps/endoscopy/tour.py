"""The endoscopy stop of the tour: size rendered polyps of known truth with the shipped network."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from endoscopy.bundles.bundle_fitting import shipped_folder
from endoscopy.bundles.sizing_bundle import load_bundle
from endoscopy.evaluation.baselines import REGRESSION, cue_baselines
from endoscopy.evaluation.conformal import coverage_interval
from endoscopy.evaluation.rendered_frames import (
    FrameStack,
    frame_features,
    predictions_of,
    rendered_frames,
)
from endoscopy.evaluation.size_evaluation import verdict
from endoscopy.evaluation.size_scores import score_intervals
from endoscopy.explain.saliency import gate_figure
from endoscopy.explain.strips import Track, strip_figure
from endoscopy.metrics import object_table
from endoscopy.models import gates_of
from endoscopy.plots import size_figure
from endoscopy.prediction import predictor_of
from endoscopy.renderer import RendererConfig, render_objects
from harness.evidence import Interval
from harness.report.page import Page, TourRow, TourStop, TourTask

WEIGHTS = ("synthetic", "configured-s0")
OBJECTS, SEED = 100, 777  # no training has this seed
TRAINING_OBJECTS = 150  # of the shipped network, and so of the baselines
VALIDATION_OBJECTS = 50  # on which the degree of the regression is chosen
SCORES = ("mape", "macro_f1")
CUES = {"constant": "constant", "area": "mask area", "area and brightness": REGRESSION}


def tour(folder: Path, say: Callable[[str], None]) -> TourStop:
    """Render polyps that no network has seen, and size them.

    Args:
        folder: For files; none are needed.
        say: Tells the progress.
    """
    del folder
    bundle = load_bundle(shipped_folder(*WEIGHTS))
    parts = [
        rendered_frames(render_objects(RendererConfig(seed=SEED + place), range(objects)))
        for place, objects in ((1, TRAINING_OBJECTS), (2, VALIDATION_OBJECTS), (0, OBJECTS))
    ]
    test = parts[-1]
    say(f"rendered {sum(len(set(part.objects)) for part in parts)} objects")
    tables = _baselines(parts)
    frames = predictions_of(predictor_of(bundle), test)
    tables["network"] = object_table(frames)
    say(f"sized {OBJECTS} objects")
    scores = {n: score_intervals(t, only=SCORES, resamples=500) for n, t in tables.items()}
    rows = [_row(tables, scores)]
    if bundle.conformal is not None:
        rows.append(_coverage(coverage_interval([tables["network"]], [bundle.conformal])))

    track = _track(test, frames)

    def draw(page: Page) -> None:
        page.figure(
            strip_figure(track),
            "How large is a polyp? A network estimates it from each of six frames.",
        )
        page.text(
            f"{OBJECTS} polyps rendered just now, six frames each, sized from the frame and the "
            "outline of the polyp. Network and baselines were trained on 150 others. Rendered "
            "sizes can nearly be read from three numbers: a regression on the area of the outline "
            "and two brightnesses stands in the table, too. Truth is known to the micrometer; "
            "nothing here says anything about real polyps. **Research only.**"
        )
        cells = [[name, *(found[k].value for k in SCORES)] for name, found in scores.items()]
        page.table(["method", *SCORES], cells)
        page.figure(size_figure(tables["network"], bundle.conformal), "Median over six frames.")
        gates = {name: gate.scores().detach() for name, gate in gates_of(bundle.model).items()}
        page.figure(gate_figure(gates), "The gates after training.")

    size = f"{track.size:.1f} mm, true size {track.truth:.1f} mm"
    done = TourTask("size a polyp in six rendered frames", size, "gates endoscopy predict")
    return TourStop("Endoscopy: polyp sizing", rows, draw, [done])


def _baselines(parts: Sequence[FrameStack]) -> dict[str, pd.DataFrame]:
    """Return object tables of the constant, the apparent area, and area and brightness."""
    sizes = cue_baselines(*map(frame_features, parts))
    return {
        name: object_table(parts[-1].table.assign(predicted_mm=sizes[cue]))
        for name, cue in CUES.items()
    }


def _row(tables: dict[str, pd.DataFrame], scores: dict[str, dict[str, Interval]]) -> TourRow:
    mape = {name: found["mape"] for name, found in scores.items()}
    own = mape["network"]
    verdicts = {name: verdict(tables["network"], tables[name], resamples=500) for name in CUES}
    better = [name for name, found in verdicts.items() if found == "significantly better"]
    rest = [name for name in CUES if name not in better]
    return TourRow(
        "Feature-selection gates, gradient routing",
        "relative error of the size (MAPE)",
        f"{own.value:.3f} [{own.low:.3f}, {own.high:.3f}]",
        f"constant {mape['constant'].value:.2f}, area {mape['area'].value:.2f}, area and brightness"
        f" {mape['area and brightness'].value:.2f}",
        f"significantly better than {', '.join(better) or 'none'}{', not than ' if rest else ''}"
        f"{', '.join(rest)}",
    )


def _coverage(found: Interval) -> TourRow:
    return TourRow(
        "Conformal intervals",
        f"coverage of 90 % intervals, {OBJECTS} polyps",
        f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]",
        "nominal 0.90",
        "compatible with 90 %" if found.low <= 0.9 <= found.high else "not compatible with 90 %",
    )


def _track(test: FrameStack, frames: pd.DataFrame) -> Track:
    """Return the frames of the object with the median size."""
    sizes = frames.drop_duplicates("unique_id").sort_values("gt")["unique_id"]
    own = (frames["unique_id"] == sizes.iloc[len(sizes) // 2]).to_numpy()
    return Track(
        images=list(test.images[own]),
        boxes=test.boxes[own][:, [0, 2, 1, 3]],
        sizes=frames.loc[own, "predicted_mm"].to_numpy(float),
        reasons=[""] * int(own.sum()),
        size=float(frames.loc[own, "predicted_mm"].median()),
        low=float("nan"),
        high=float("nan"),
        calibrated=True,
        name="a polyp",
        truth=float(frames.loc[own, "gt"].iloc[0]),
    )
