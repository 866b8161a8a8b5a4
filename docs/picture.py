"""Draw the picture of the README from what ships: ``python docs/picture.py``, about a minute."""

from contextlib import chdir
from importlib.resources import files
from pathlib import Path
from runpy import run_path
from tempfile import TemporaryDirectory

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes

from endoscopy.bundles.bundle_fitting import shipped_folder
from endoscopy.bundles.sizing_bundle import load_bundle
from endoscopy.evaluation.baselines import REGRESSION, cue_baselines
from endoscopy.evaluation.rendered_frames import frame_features, predictions_of, rendered_frames
from endoscopy.metrics import object_table
from endoscopy.prediction import predictor_of
from endoscopy.renderer import RendererConfig, render_objects
from harness.figures.style import BLUE, GRID, INK, MUTED, ORANGE, TEXT_SIZE, TITLE_SIZE, new_figure
from language import load_offloaded
from language.offload.setup import Setup
from weather import OptimalInterpolation
from weather.baselines.covariance import HomogeneousCovariance
from weather.experiments.ensemble.ensemble_sample import EnsembleTask
from weather.experiments.ensemble.source import Era5EnsembleSource
from weather.plots import draw_map, symmetric_levels

TARGET = Path(__file__).parent / "images" / "results.png"
EXAMPLES = Path(__file__).parents[1] / "examples"


def weather(axes: list[Axes]) -> str:
    """Draw the error of a background and of its analysis, one grid point in ten observed."""
    sample = Era5EnsembleSource()
    case = sample.cases("persistence")[-1]
    covariance = HomogeneousCovariance.from_samples(
        sample.errors("persistence"), sample.grid, length_km=800.0
    )
    situation = sample.situation(EnsembleTask("persistence", 0.1), case)
    fields = case.background, situation.analyze(OptimalInterpolation(covariance))
    z500 = sample.channels.index("geopotential", 500)
    errors = [(one - case.truth)[z500] for one in fields]
    for place, error, name in zip(axes, errors, ("background", "analysis"), strict=True):
        draw_map(
            place, error, sample.grid, levels=symmetric_levels(1500.0), cmap=mpl.colormaps["RdBu_r"]
        )
        place.set_title(f"{name} − truth", fontsize=TEXT_SIZE, color=MUTED)
    before, after = (sample.grid.area_mean(one.square()).sqrt().item() for one in errors)
    return f"Weather: {before:.0f} m² s⁻² to {after:.0f}, a point in ten observed"


def endoscopy(axes: Axes) -> str:
    """Draw predicted over true sizes of polyps that were rendered just now."""
    known, validation, frames = (
        rendered_frames(render_objects(RendererConfig(seed=seed), range(objects)))
        for seed, objects in ((12, 150), (13, 50), (11, 60))
    )
    bundle = load_bundle(shipped_folder("synthetic", "configured-s0"))
    polyps = object_table(predictions_of(predictor_of(bundle), frames))
    cues = cue_baselines(*map(frame_features, (known, validation, frames)))
    simple = object_table(frames.table.assign(predicted_mm=cues[REGRESSION]))["predicted_mm"]
    one = np.exp(np.log(known.gt).mean())  # the same size for every polyp
    network, three, same = (
        f"{(sizes / polyps['gt'] - 1).abs().mean():.0%} off"
        for sizes in (polyps["predicted_mm"], simple, one)
    )
    axes.plot([2, 25], [2, 25], color=GRID, zorder=0)
    axes.axhline(one, color=MUTED, label=f"one size for all, {same}")
    axes.scatter(
        polyps["gt"], simple, s=16, facecolors="none", edgecolors=ORANGE,
        label=f"area and brightness, {three}",
    )  # fmt: skip
    axes.scatter(
        polyps["gt"], polyps["predicted_mm"], s=12, color=BLUE, label=f"network, {network}"
    )
    axes.legend(frameon=False, fontsize=TEXT_SIZE - 2, loc="upper left", labelspacing=0.2)
    axes.set(xscale="log", yscale="log", xlabel="true size of the polyp, mm", ylabel="sized, mm")
    ticks = [2, 5, 10, 20]
    axes.set_xticks(ticks, map(str, ticks), minor=False)
    axes.set_yticks(ticks, map(str, ticks), minor=False)
    axes.set_ylim(1.7, 40)
    axes.minorticks_off()
    return "Endoscopy: sizes of rendered polyps"


def diffusion(axes: list[Axes]) -> str:
    """Draw a prompt by the base, by each adapter, by their sum and by both through gates."""
    with TemporaryDirectory() as folder, chdir(folder):  # the example writes its own picture
        drawn = run_path(str(EXAMPLES / "diffusion_adapters.py"))["figure"].axes
    for place, one in zip(axes, drawn, strict=True):
        place.imshow(one.images[0].get_array())
        place.set_title(one.get_title().removesuffix(" alone"), fontsize=TEXT_SIZE, color=MUTED)
    return "Image models: two adapters in one drawing"


def language(axes: Axes) -> str:
    """Draw how many experts a byte waits for, by the part of the experts that is in memory."""
    folder = files("language") / "weights/experts/weights/decoder-s0"
    prompt = torch.tensor([list(b"def mean(values):\n    ")])
    budgets, waits, texts = (0.2, 0.25, 0.35, 0.5, 0.75, 1.0), [], set()
    for budget in budgets:
        model = load_offloaded(folder, budget=budget, setup=Setup(predictor="cross-layer"))
        texts.add(tuple(model.generate(prompt, max_new_tokens=96, do_sample=False)[0].tolist()))
        waits.append(model.offload.counts.loads / 96)
        model.offload.close()
    assert len(texts) == 1, "the text depends on the budget"
    axes.bar([f"{budget:.0%}" for budget in budgets], waits, color=BLUE, width=0.6)
    axes.set(xlabel="experts in memory", ylabel="waited for, of 12 a byte")
    return "Language: experts on disk, the text the same"


def main() -> None:
    """Write the picture."""
    figure = new_figure(9.6, 4.6)
    grid = figure.add_gridspec(
        2, 2, hspace=0.75, wspace=0.2, left=0.04, right=0.98, top=0.9, bottom=0.11
    )
    titles = []
    for number, (draw, parts) in enumerate(
        ((weather, 2), (endoscopy, 0), (diffusion, 5), (language, 0))
    ):
        cell = grid[divmod(number, 2)]
        if parts:
            axes = [figure.add_subplot(one) for one in cell.subgridspec(1, parts, wspace=0.05)]
            for place in axes:
                place.set(xticks=[], yticks=[])
                place.set_frame_on(False)
        else:
            axes = figure.add_subplot(cell)
            axes.xaxis.label.set_size(TEXT_SIZE)
            axes.yaxis.label.set_size(TEXT_SIZE)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=TEXT_SIZE)
        titles.append(draw(axes))
        left, top = cell.get_position(figure).x0, cell.get_position(figure).y1
        figure.text(left, top + 0.05, titles[-1], fontsize=TITLE_SIZE, weight="bold", color=INK)
    TARGET.parent.mkdir(exist_ok=True)
    figure.savefig(TARGET, dpi=110)


if __name__ == "__main__":
    main()
