"""The video stop of the tour: a feed simulated just now, networks trained just now."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from apps.video.comparison import ORACLE, TRUTH
from apps.video.training import ranker_of, train
from harness.evidence import Row, compare
from harness.experiment import Job, Piece
from harness.report.page import Page
from harness.report.stop import TourRow, TourStop
from recsys.data.datamodule import TableDataModule
from recsys.diagnosis.expert_report import ExpertReport
from recsys.experiments.building import data_of
from recsys.experiments.claims import AUC
from recsys.experiments.contest import Contest
from recsys.experiments.faults import HEALTHY, report_of
from recsys.experiments.predictions import Probabilities, baseline, probabilities, scores_of
from recsys.figures import gates_figure, scales_figure
from recsys.metrics.resampled import user_resamples

HOME, MMOE, TREES, DURATION = "HoME", "MMoE", "trees", "duration only"
CONTEST = Contest(
    {
        HOME: {"net": "HoME"},
        MMOE: {"net": "MMoE", "options": {"tower_dims": [16]}},
    },
    reference=HOME,
)
OPTIONS = {"dim": 16, "hidden_dims": [32], "rank": [4, 4], "tower_dims": [16]}
FEED = "video_multitask.sources.simulated.SimulatedFeed"
WORLD = {"users": 1_000, "videos": 1_500, "days": 10, "validation_days": 1, "test_days": 2}
EXPLICIT = "video_multitask.sources.explicit.ExplicitLog"
LOG, USERS = "kuairand27k_explicit_log.parquet", "kuairand_user_features.parquet"
LONG_VIEW = "long_view"
RESAMPLES = 500
LOSS = "log_loss"


@dataclass
class Trained:
    """Networks of equal size on the same rows.

    Attributes:
        data: The rows.
        reports: Of the experts of each network.
        found: Predictions of the test rows, method by method.
    """

    data: TableDataModule
    reports: dict[str, ExpertReport]
    found: dict[str, Probabilities]

    def rows(self, task: str = "") -> dict[tuple[str, str], Row]:
        """Return log-loss or AUC of each method, and the differences from HoME.

        Args:
            task: Whose AUC; log-loss summed over all tasks if empty.

        Returns:
            By method and what was subtracted, which is empty for the figure itself.
        """
        test, tasks = self.data.batch("test"), self.data.schema.task_names
        scores = {m: scores_of(test, p, tasks, exact_auc=bool(task)) for m, p in self.found.items()}
        draws = user_resamples(test.user.numpy(), resamples=RESAMPLES)
        chosen = {method: [one[task]] for method, one in scores.items()}
        wanted = AUC if task else LOSS
        rows = compare(chosen, draws, task=task, reference=HOME)
        return {(r.method, r.versus): r for r in rows if r.metric == wanted}


def tour(
    folder: Path, say: Callable[[str], None], *, rows: int = 50_000, epochs: int = 3
) -> TourStop:
    """Show collapse and its cure, what it is worth, and real rows where they are at hand.

    Args:
        folder: For checkpoints, which are removed.
        say: Tells the progress.
        rows: Of the simulated feed.
        epochs: Of training with normalized inputs; on real rows at most two.
    """
    with TemporaryDirectory(dir=_made(folder)) as temporary:
        place = Path(temporary)
        raw = _feed("raw", rows, 1, 1e-2, place / "raw")
        say(f"simulated {rows:,} rows, trained {HOME} and {MMOE} with raw counts as inputs")
        plain = _feed("normalized", rows, epochs, 5e-3, place / "normalized")
        _add_bounds(plain)
        say(f"trained both with normalized counts, {epochs} epochs")
        missing = _missing()
        real = None if missing else _real(min(epochs, 2), place / "real")
    say(missing or f"trained both and {TREES} on real rows")
    losses = plain.rows()
    table = [_faults(raw), _accuracy(losses)]
    if real is not None:
        table.append(_real_row(real.rows(LONG_VIEW)))

    def draw(page: Page) -> None:
        _draw_faults(page, raw, plain)
        _draw_losses(page, plain, losses)
        page.text(missing or _about_real(real))

    return TourStop("Short video: many behaviors at once", table, draw)


def _feed(counts: str, rows: int, epochs: int, rate: float, folder: Path) -> Trained:
    source = {**WORLD, "rows": rows, "seed": 5, "heavy_counts": counts}
    return _trained(FEED, source, epochs, rate, folder, batch_size=512)


def _real(epochs: int, folder: Path) -> Trained:
    """Return networks and trees on real rows, from columns without identifiers or histories."""
    source = {
        "path": str(_shared() / LOG), "users_path": str(_shared() / USERS), "encoder": "none",
        "dim": 4,
    }  # fmt: skip
    made = _trained(EXPLICIT, source, epochs, 2e-3, folder, batch_size=512)
    trees = baseline({"kind": TREES, "max_iter": 100}, made.data.transform)
    predicted = trees.fit(made.data.batch("train")).predict(made.data.batch("test"))
    made.found[TREES] = predicted
    return made


def _trained(
    kind: str, source: Mapping[str, Any], epochs: int, rate: float, folder: Path, batch_size: int
) -> Trained:
    """Train HoME and MMoE, keep the weights of the best epoch and predict the test rows."""
    common: dict[str, Any] = {
        "data.source.class_path": kind,
        **{f"data.source.init_args.{name}": value for name, value in source.items()},
        "data.batch_size": batch_size,
        "model.net": HOME,
        **{f"model.options.{name}": value for name, value in OPTIONS.items()},
        "model.learning_rate": rate,
        "model.embedding_learning_rate": 0.05,
        "trainer.max_epochs": epochs,
    }
    made = Trained(data_of(common), {}, {})
    test = made.data.batch("test")
    for method in (HOME, MMOE):
        own = CONTEST.settings(method, common, made.data.schema)
        piece = Piece(method, 0, None, {**common, **own})
        ranker = ranker_of(piece, train(piece, Job(folder / method), {}), made.data)
        made.found[method] = probabilities(ranker, test)
        made.reports[method] = report_of(ranker, test)
    return made


def _add_bounds(trained: Trained) -> None:
    """Add what the duration alone predicts, and the true probabilities."""
    data = trained.data
    one = baseline({"kind": "one_column", "column": "duration_ms"}, data.transform)
    trained.found[DURATION] = one.fit(data.batch("train")).predict(data.batch("test"))
    columns = [f"{TRUTH}{task}" for task in data.schema.task_names]
    trained.found[ORACLE] = data.table("test").select(columns).to_numpy()


def _faults(raw: Trained) -> TourRow:
    """Return whether the experts of HoME are healthy where those of MMoE are not."""
    home, mmoe = (raw.reports[method].summary() for method in (HOME, MMOE))
    left = [name for name, most in HEALTHY.items() if home[name] > most]
    return TourRow(
        f"{HOME}, raw counts as inputs",
        "scale of experts, largest over smallest",
        f"{home['scale_ratio']:.1f}",
        f"{MMOE} {mmoe['scale_ratio']:.1f}, an expert of it zero in {mmoe['zero_rate_max']:.0%}",
        f"out of bounds: {', '.join(left)}" if left else "no collapse",
        not left and home["scale_ratio"] < mmoe["scale_ratio"],
    )


def _accuracy(losses: Mapping[tuple[str, str], Row]) -> TourRow:
    own = losses[HOME, ""]
    rivals = (MMOE, DURATION)
    better = [m for m in rivals if losses[m, HOME].significant and losses[m, HOME].value > 0]
    worse = [m for m in rivals if losses[m, HOME].significant and losses[m, HOME].value < 0]
    same = [m for m in rivals if m not in (*better, *worse)]
    parts = [("better than", better), ("not distinguishable from", same), ("worse than", worse)]
    others = [f"{m} {losses[m, ''].value:.3f}" for m in (*rivals, ORACLE)]
    return TourRow(
        f"{HOME}, normalized inputs, rates not tuned",
        "log-loss, summed over 14 behaviors",
        f"{own.value:.3f} [{own.low:.3f}, {own.high:.3f}]",
        ", ".join(others),
        "; ".join(f"{words} {' and '.join(names)}" for words, names in parts if names),
        len(better) == len(rivals),
    )


def _real_row(areas: Mapping[tuple[str, str], Row]) -> TourRow:
    own, gap = areas[HOME, ""], areas[TREES, HOME]
    return TourRow(
        f"{HOME}, real KuaiRand rows",
        "AUC of long views",
        f"{own.value:.3f} [{own.low:.3f}, {own.high:.3f}]",
        f"{MMOE} {areas[MMOE, ''].value:.3f}, {TREES} {areas[TREES, ''].value:.3f}",
        f"{-gap.value:+.3f} [{-gap.high:.3f}, {-gap.low:.3f}] to {TREES}; selected rows, no claim",
    )


def _draw_faults(page: Page, raw: Trained, plain: Trained) -> None:
    page.text(
        "A feed of 14 behaviors, simulated just now; every network has the weights of HoME within "
        "5 % and was trained just now. With raw, heavy-tailed counts among the inputs, plain ReLU "
        "experts drift apart in scale and output zeros, so that a gate cannot weigh them fairly. "
        "Normalized Swish experts do not; but the first gates of HoME read the raw counts, too, "
        "and may settle on one expert. With normalized counts, the default, less is left to cure."
    )
    reports = {f"{m}, raw counts": r for m, r in raw.reports.items()}
    reports |= {f"{m}, normalized": r for m, r in plain.reports.items()}
    caption = "Standard deviation of the outputs of every expert: collapse spreads them."
    page.figure(scales_figure(reports), caption)
    for method, report in raw.reports.items():
        page.figure(gates_figure(report), f"{method}, raw counts: mean weight of every gate.")


def _draw_losses(page: Page, plain: Trained, losses: Mapping[tuple[str, str], Row]) -> None:
    methods = (DURATION, MMOE, HOME, ORACLE)
    page.table(
        ["method", "summed log-loss", "minus HoME", "95 % interval"],
        [[m, losses[m, ""].value, *_gap(losses.get((m, HOME)))] for m in methods],
    )
    users = losses[HOME, ""].n
    page.text(
        f"{len(plain.data.batch('test')):,} test rows of the last two days, intervals over {users} "
        "users. The oracle predicts the true probabilities. Learning rates are not tuned here, "
        "and one seed is no comparison: that is `gates video evaluate --config simulator`."
    )


def _gap(row: Row | None) -> Sequence[Any]:
    return ["", ""] if row is None else [row.value, f"[{row.low:.3f}, {row.high:.3f}]"]


def _about_real(real: Trained | None) -> str:
    rows = 0 if real is None else len(real.data.batch("test"))
    return (
        f"Real rows: {rows:,} of KuaiRand-27K from the last two days at hand (Gao et al. 2022, "
        "CC BY-SA 4.0). They were selected on likes and dislikes: a check of the pipeline, no "
        "claim of quality."
    )


def _missing() -> str:
    """Return why there are no real rows; empty if there are."""
    absent = [name for name in (LOG, USERS) if not (_shared() / name).is_file()]
    if not absent:
        return ""
    return f"no real rows: {_shared() / absent[0]} is absent; GATES_SHARED names another folder"


def _shared() -> Path:
    return Path(os.environ.get("GATES_SHARED", "../shared")) / "data" / "recsys"


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
