"""What `evaluate` keeps for figures, and the figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from apps.weather.ensemble import EnsembleScores, task_name
from apps.weather.tuning import built
from apps.weather.twin import TwinScores
from core_gates import GateMonitor
from core_gates.errors import GatesError
from harness.report.gates import save_gates
from weather.experiments.ensemble.cases import analyze_case
from weather.experiments.ensemble.source import Era5EnsembleSource
from weather.experiments.twin.source import TwinSource
from weather.observations.gridded import GriddedObservations
from weather.plots import analysis_figure, cycle_figure
from weather.plots.labels import field_label, unit_label

EXAMPLE_FILE, CYCLES_FILE = "example.safetensors", "cycles.safetensors"


def save_cycles(scores: TwinScores, folder: Path) -> None:
    """Keep the analysis RMSE of every cycle, ``task|method`` to (T,B,C)."""
    tensors = {
        f"{task}|{method}": cycles.analysis.float().contiguous()
        for (task, method), cycles in scores.scores.items()
    }
    _save(tensors, folder / CYCLES_FILE)


def save_example(scores: EnsembleScores, folder: Path) -> None:
    """Keep the fields of the last case of ``persistence``, analyzed by OI and by Adas."""
    source, density = scores.source, max(scores.densities)
    case = source.cases("persistence")[-1]
    name = task_name("persistence", density)
    oi = next(m for m in scores.methods("persistence") if m.name == "oi")
    tensors = {
        "truth": case.truth,
        "background": case.background,
        "observed": source.observe_case("persistence", case, density).mask.any(0).float(),
    }
    assimilators = {"oi": built(scores.settings, oi, name)}
    if "adas_increment" in scores.forms:
        sd = source.task_background_sd["persistence"]
        network = scores.networks.load("adas_increment", scores.seeds[0])
        assimilators["adas_increment"] = network.expecting(sd)
    for method, assimilator in assimilators.items():
        tensors[method] = analyze_case(source, "persistence", case, density, assimilator)
    _save({k: v.contiguous().clone() for k, v in tensors.items()}, folder / EXAMPLE_FILE)


def watch_gates(scores: EnsembleScores | TwinScores, folder: Path) -> None:
    """Keep the gate values of one analysis by the increment form, or the first form there is.

    It is the last case of ``persistence``, or the first cycle of a twin world, at the largest
    density.
    """
    form = "adas_increment" if "adas_increment" in scores.forms else scores.forms[0]
    network = scores.networks.load(form, scores.seeds[0])
    if isinstance(scores, TwinScores):
        world = scores.evaluation.world
        density = max(task.density for task in scores.evaluation.tasks)
        background = world.first_background("test")[:1]
        first = next(iter(world.observations("test", density)))
        observations = GriddedObservations(first.values[:1], first.errors[:1])
    else:
        source, density = scores.source, max(scores.densities)
        case = source.cases("persistence")[-1]
        network = network.expecting(source.task_background_sd["persistence"])
        background = case.background[None, None]
        observed = source.observe_case("persistence", case, density)
        observations = GriddedObservations.stack([observed])
    with GateMonitor(network) as monitor:
        network.analyse(background, observations)
        save_gates(monitor, folder)


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    partial.replace(path)


def _load(path: Path) -> dict[str, torch.Tensor]:
    """Read tensors that `_save` wrote.

    Raises:
        GatesError: The file is damaged.
    """
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise GatesError(
            f"{path} is damaged ({error}): run `gates weather evaluate` again"
        ) from error


def example_figures(folder: Path, source: Era5EnsembleSource) -> list[tuple[str, Figure]]:
    """Return a map panel of 500 hPa geopotential for each method, with its caption."""
    path = folder / EXAMPLE_FILE
    if not path.is_file():
        return []
    fields = _load(path)
    channel = source.channels.index("geopotential", 500)
    figures = []
    for method in ("adas_increment", "oi"):
        if method in fields:
            figure = analysis_figure(
                fields["truth"][channel],
                fields["background"][channel],
                fields[method][channel],
                source.grid,
                variable="geopotential",
                level=500,
                observed=fields["observed"].bool(),
                title=f"{method}: geopotential at 500 hPa",
            )
            figures.append((f"{method}, 2 January 2017 12 UTC, member 9 is the truth", figure))
    return figures


def cycle_figures(folder: Path, source: TwinSource) -> list[tuple[str, Figure]]:
    """Return the error of every method over the cycles, one figure a task."""
    path = folder / CYCLES_FILE
    if not path.is_file():
        return []
    tensors = _load(path)
    figures = []
    for task in dict.fromkeys(key.split("|")[0] for key in tensors):
        errors: dict[str, np.ndarray] = {
            key.split("|")[1]: value[:, :, 0].T.numpy()
            for key, value in tensors.items()
            if key.split("|")[0] == task
        }
        variable, level = next(iter(source.channels))
        label = f"analysis RMSE of {field_label(variable, level)}, {task}"
        cycles = len(next(iter(errors.values())).T)
        figures.append(
            (
                f"Median over seeds and their range, {task}",
                cycle_figure(
                    errors,
                    hours=source.world.hours,
                    label=label,
                    unit=unit_label(variable),
                    spin_up=cycles // 3,
                ),
            )
        )
    return figures
