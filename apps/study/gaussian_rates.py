"""``gates study gaussian-rates``: is the temperature of a softmax gate sample efficient?"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from apps.study.study_run import Flags, StudyRun, open_study
from core_gates.errors import GatesError
from harness.command.verbs import Place
from harness.evidence import Bar, Resamples, Row
from harness.experiment import Arrays, Job, Piece, Run
from harness.report.page import Page
from studies.gaussian.gaussian_mixture import Array
from studies.gaussian.rates import CASES, ERRORS, Case, errors_of, slopes
from studies.gaussian.ridge import FACTORS, LETTERS, rates_figure, ridge_figure, ridge_map

FITS, MAPS = "fits", "maps"
MEDIANS = "median errors"
MAPPED = ("identity", "tanh")
CONVERGED = 1e-6  # of the gradient
RATE, FLAT, GAIN = (-0.75, -0.3), (-0.15, 0.15), (-1.15, -0.85)
BANDS = {
    "tanh": {"beta1": RATE, "tau": RATE, "a": RATE, "b": RATE, "nu": RATE, "gain": GAIN},
    "identity": {"beta1": FLAT, "tau": FLAT, "beta1_over_tau": RATE, "gain": GAIN},
}
"""Where slopes must lie, from the wide starts."""

MINUTES = 0.0002  # of one core, for 1,000 points, an expert and a start
QUICK, FEW = 4, 12  # repeats: of --quick, and of cases with several starts, minutes each
NOTE = (
    "Slopes of the logarithm of the median error against the logarithm of the number of sample "
    "points; −0.5 is the parametric rate, 0 none. Starts lie around the truth with the standard "
    "deviation that the task names, the same for all sizes; intervals are from repeats, of which "
    f"cases with several starts have {FEW} at most."
)


def gaussian_rates(
    place: Place,
    flags: Flags,
    sizes: tuple[int, ...] = (1_000, 4_000, 16_000, 64_000),
    repeats: int = 40,
    starts: tuple[float, ...] = (0.3, 0.05),
) -> None:
    """Fit mixtures of known truth, and measure how fast each parameter is found.

    Args:
        place: Filled in by the command line.
        flags: Filled in by the command line.
        sizes: Numbers of sample points, two at least for a slope.
        repeats: Samples and starts of each size, two at least; cases with several starts have 12 at
            most.
        starts: Standard deviations of the starts around the truth; bars are for the first.
    """
    if len(set(sizes)) < 2 or min(sizes) < 100:
        raise GatesError(f"--sizes is {list(sizes)}, expected two or more from 100, for a slope")
    if repeats < 2 or not starts or not all(0 < start < np.inf for start in starts):
        raise GatesError(
            f"--repeats is {repeats} and --starts {list(starts)}, expected two repeats at least, "
            "for an interval, and positive numbers"
        )
    if flags.quick:
        sizes, repeats = sizes[:2], min(repeats, QUICK)
    work = sum(
        case.restarts * case.num_fitted * repeats_of(case, repeats)
        * (len(starts) if case.restarts == 1 else 1)
        for case in CASES.values()
    )  # fmt: skip
    minutes = MINUTES * work * sum(sizes) / 1000
    run = open_study(
        place, "gaussian-rates", flags, methods=CASES, seeds=range(repeats),
        settings={"sizes": list(sizes)}, minutes=minutes,
    )  # fmt: skip
    rows: list[Row] = []
    for spread in dict.fromkeys(starts):
        fits = fits_of(run, spread, repeats, restarts=spread == starts[0])
        rows += _rows(run, fits, spread)
    lost = ridge_maps(run)
    rows += _ridge_rows(lost)
    medians = {row.task for row in rows if row.task.startswith(MEDIANS)}
    run.finish(
        rows, _bars(rows, starts[0]), seeds=range(repeats), headline=_headline(rows, starts[0]),
        notes=[NOTE], unprinted=medians,
    )  # fmt: skip


def repeats_of(case: Case, repeats: int) -> int:
    """Return how many repeats a case has."""
    return repeats if case.restarts == 1 else min(repeats, FEW)


def find(piece: Piece, job: Job) -> dict[str, Tensor]:
    """Fit the samples of one repeat."""
    del job
    seed = piece.seed or 0
    errors = errors_of(CASES[piece.method], piece["sizes"], piece["spread"], seed)
    return {name: torch.from_numpy(values) for name, values in errors.items()}


def map_ridge(piece: Piece, job: Job) -> dict[str, Tensor]:
    """Compute the likelihood around the truth."""
    del job
    return {"lost": torch.from_numpy(ridge_map(CASES[piece.method]))}


def fits_of(
    run: Run, spread: float, repeats: int, *, restarts: bool
) -> dict[str, dict[str, Array]]:
    """Return method -> errors (N, S, P) and slopes (N, S), after what is missing was fitted.

    Args:
        run: Keeps the fits.
        spread: Standard deviation of the starts around the truth.
        repeats: N, see `repeats_of`.
        restarts: Whether cases with several starts take part, which cost the most.
    """
    store = run.store(FITS, Arrays())
    pieces = [
        run.piece(name, repeat, {"start": spread}, spread=spread, restarts=case.restarts)
        for name, case in CASES.items()
        if restarts or case.restarts == 1
        for repeat in range(repeats_of(case, repeats))
    ]
    pieces_of: dict[str, list[dict[str, Tensor]]] = {}
    for piece in run.obtain(store, pieces, find, scoring=True):
        pieces_of.setdefault(piece.method, []).append(store.load(piece))
    return {
        method: {
            name: np.stack([fit[name].numpy() for fit in method_fits]) for name in method_fits[0]
        }
        for method, method_fits in pieces_of.items()
    }


def ridge_maps(run: Run) -> dict[str, Array]:
    """Return method -> what is lost of the likelihood around the truth."""
    store = run.store(MAPS, Arrays())
    pieces = [Piece(name) for name in MAPPED]
    wanted = run.obtain(store, pieces, map_ridge, scoring=True)
    return {piece.method: store.load(piece)["lost"].numpy() for piece in wanted}


def _rows(run: Run, fits: Mapping[str, Mapping[str, Array]], spread: float) -> list[Row]:
    rows = []
    for method, method_fits in fits.items():
        draws = Resamples.clusters(range(len(method_fits["errors"])))
        finite = [
            place
            for place in range(len(ERRORS))
            if np.isfinite(method_fits["errors"][..., place]).all()
        ]
        names = [ERRORS[place] for place in finite]
        score = slopes(method_fits["errors"][..., finite], run.settings["sizes"], names)
        task = f"slopes, starts {spread}"
        for name, interval in draws.intervals(score).items():
            rows.append(Row(method, task, name, *interval))
        converged = float((method_fits["slope"] < CONVERGED).mean())
        rows.append(Row(method, task, "converged", converged, n=method_fits["slope"].size))
        for size, medians in zip(
            run.settings["sizes"], np.median(method_fits["errors"], 0), strict=True
        ):
            task_of_size = f"{MEDIANS}, starts {spread}, {size} points"
            rows += [Row(method, task_of_size, ERRORS[i], float(medians[i])) for i in finite]
    return rows


def _ridge_rows(lost: Mapping[str, Array]) -> list[Row]:
    """Return what is lost along (λβ1, λβ0, λτ): the most, and where λ is a half."""
    rows = []
    for method, ridge_losses in lost.items():
        line = np.diagonal(ridge_losses)
        rows.append(Row(method, "ridge", "largest change", float(np.abs(line).max())))
        rows.append(Row(method, "ridge", "lost at half", float(-line[0])))
    return rows


def _headline(rows: Sequence[Row], spread: float) -> str:
    """Return the slopes of the temperature in a sentence."""
    task = f"slopes, starts {spread}"
    tau_of = {row.method: row for row in rows if row.task == task and row.metric == "tau"}
    said = [
        f"{name} {tau_of[name].value:.2f} [{tau_of[name].low:.2f}, {tau_of[name].high:.2f}]"
        for name in MAPPED
        if name in tau_of
    ]
    return f"Slope of the error of the temperature: {', '.join(said)}." if said else ""


def _bars(rows: Sequence[Row], spread: float) -> list[Bar]:
    task = f"slopes, starts {spread}"
    row_of = {(row.method, row.metric): row for row in rows if row.task == task}
    ridge = {(row.method, row.metric): row for row in rows if row.task == "ridge"}
    bars = []
    for method, bands in BANDS.items():
        for name, (low, high) in bands.items():
            if (row := row_of.get((method, name))) is not None:
                label = f"{method}: slope of {name}"
                bars += [Bar(label, row.value, ">=", low), Bar(label, row.value, "<=", high)]
    for (method, name), row in row_of.items():
        if name == "converged" and method in BANDS:
            bars.append(Bar(f"{method}: fits with a gradient below 1e-6", row.value, ">=", 0.95))
    if len(ridge) > 2:
        flat, drop = ridge["identity", "largest change"], ridge["tanh", "lost at half"]
        bars.append(Bar("identity: change along the ridge", flat.value, "<=", 1e-10))
        bars.append(Bar("tanh: likelihood lost at half", drop.value, ">=", 1e-2))
    return bars


def draw(page: Page, run: StudyRun) -> None:
    """Add the ridge and the errors by size to the report.

    Args:
        page: The report.
        run: Of the study.
    """
    store = run.store(MAPS, Arrays())
    maps = {p.method: store.load(p)["lost"].numpy() for p in map(Piece, MAPPED) if store.find(p)}
    if maps:
        page.section("The ridge").figure(
            ridge_figure(maps),
            "How much less likely a sample of 4,000 points is where slope and temperature are "
            "multiplied. With the identity all of the diagonal is as likely as the truth.",
            name="ridge",
            table=(
                ("activation", "slope", "temperature", "lost"),
                [[name, s, t, float(lost[i, j])] for name, lost in maps.items()
                 for i, s in enumerate(FACTORS) for j, t in enumerate(FACTORS)],
            ),
        )  # fmt: skip
    medians_of = _medians(run.rows)
    for start, medians in medians_of.items():
        sizes = np.array(
            sorted({size for errors_of_size in medians.values() for size in errors_of_size})
        )
        shown = {
            name: {
                error: np.array([errors_of_size[size][error] for size in sizes])
                for error in LETTERS
            }
            for name, errors_of_size in medians.items()
            if LETTERS.keys() <= errors_of_size[sizes[0]].keys()
        }
        if shown:
            page.section(f"Errors by size, {start}").figure(
                rates_figure(shown, sizes, start),
                "Medians over repeats; both axes are logarithmic. What falls like the dotted line "
                "is estimated at the parametric rate.",
                name="rates",
            )  # fmt: skip


def _medians(rows: Sequence[Row]) -> dict[str, dict[str, dict[int, dict[str, float]]]]:
    """Return start -> method -> size -> error -> median."""
    medians_of: dict[str, dict[str, dict[int, dict[str, float]]]] = {}
    for row in rows:
        if row.task.startswith(MEDIANS):
            _, start, points = row.task.split(", ")
            errors_of_size = medians_of.setdefault(start, {}).setdefault(row.method, {})
            errors_of_size.setdefault(int(points.split()[0]), {})[row.metric] = row.value
    return medians_of
