"""The video stop of the tour: a feed simulated just now, networks trained just now."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from apps.video.comparison import train
from harness.command.configfile import find_config, read_config
from harness.evidence import Row, compare
from harness.experiment import Job, Piece, flatten
from harness.figures.style import BLUE, ORANGE, TEXT_SIZE, dress, head, new_figure, place
from harness.report.page import Page, TourRow, TourStop, TourTask
from harness.runs.terminal import SHORT, stepping
from recsys.data.datamodule import TableDataModule
from recsys.diagnosis.expert_report import ExpertReport
from recsys.experiments import (
    HEALTHY,
    IN_WORDS,
    ORACLE,
    Contest,
    Probabilities,
    baseline,
    data_of,
    oracle_of,
    probabilities,
    ranker_of,
    report_of,
    scores_of,
)
from recsys.figures import gates_figure, scales_figure
from recsys.metrics.resampled import user_resamples

HOME, MMOE, CGC = "HoME", "MMoE", "CGC"
DURATION = "duration only"
METHODS = {HOME: "home", MMOE: "mmoe"}
RAW = {**METHODS, CGC: "cgc"}
NORMALIZED = {HOME: "normalized_home", MMOE: "normalized_mmoe"}
ARGUMENTS = "data.source.init_args."
RESAMPLES = 500
LOSS = "log_loss"
ONE_SEED = f"one seed decides nothing: tuned, over three seeds, {HOME} and {MMOE} are level"
FIRST = 10  # videos of a ranked feed


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

    def rows(self) -> dict[tuple[str, str], Row]:
        """Return log-loss of each method, summed over all tasks, and the differences from HoME.

        Returns:
            By method and what was subtracted, which is empty for the figure itself.
        """
        test, tasks = self.data.batch("test"), self.data.schema.task_names
        scores = {m: scores_of(test, p, tasks, exact_auc=False) for m, p in self.found.items()}
        draws = user_resamples(test.user.numpy(), resamples=RESAMPLES)
        chosen = {method: [one[""]] for method, one in scores.items()}
        rows = compare(chosen, draws, task="", reference=HOME)
        return {(r.method, r.versus): r for r in rows if r.metric == LOSS}


def tour(folder: Path, say: Callable[[str], None], *, rows: int | None = None) -> TourStop:
    """Show collapse and its cure, and what it is worth.

    Args:
        folder: For checkpoints, which are removed.
        say: Tells the progress.
        rows: Of the simulated feed; those of the configuration ``stress`` if None.
    """
    size = {} if rows is None else {f"{ARGUMENTS}rows": rows}
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as temporary:
        place = Path(temporary)
        raw = _trained("stress", RAW, size, place / "raw", say)
        say(f"trained with raw counts as inputs: {HOME}, {MMOE} and {CGC}")
        plain = _trained("stress", NORMALIZED, size, place / "normalized", say)
        _add_bounds(plain)
        say(f"trained with normalized counts: {HOME} and {MMOE}")
    say("resampling users")
    losses = plain.rows()
    table = [_faults(raw), _accuracy(losses)]

    feed, first = _feed(plain)

    def draw(page: Page) -> None:
        page.figure(
            feed,
            "Which video should a viewer see next? A network predicts how likely 14 reactions are. "
            "Here are unseen videos of one viewer, ranked by the chance that they are watched.",
            name="feed",
        )
        _draw_faults(page, raw, plain)
        _draw_losses(page, plain, losses)

    rank = TourTask("rank the videos of a feed", first, "gates video score")
    return TourStop("Short video: many behaviors at once", table, draw, [rank])


def _feed(trained: Trained) -> tuple[Figure, str]:
    """Draw the ranked videos of the user with the most test rows, and say what became of them."""
    test, task = trained.data.batch("test"), trained.data.schema.task_names[0]
    of_user = (test.user == test.user.mode().values).numpy()
    chances, done = trained.found[HOME][of_user, 0], test.labels.numpy()[of_user, 0] > 0
    order = chances.argsort()[::-1]
    figure = new_figure(9.0, 3.4)
    axes = place(figure, 0.7, 0.55, 8.1, 1.9)
    for happened, color, label in ((True, BLUE, "watched"), (False, ORANGE, "not watched")):
        ranks = np.flatnonzero(done[order] == happened)
        axes.bar(ranks + 1, chances[order][ranks], color=color, width=0.9, label=label)
    dress(axes, x="rank", y="predicted chance")
    axes.set_xlim(0, len(order) + 1)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=TEXT_SIZE,
                frameon=False)  # fmt: skip
    head(figure, "A ranked feed", f"{task} of one viewer's {len(order)} videos, by {HOME}")
    return figure, (
        f"of the first {FIRST} videos of a viewer's feed {done[order][:FIRST].mean():.0%} are "
        f"watched, of all {len(order)} {done.mean():.0%}"
    )


def _trained(
    config: str,
    methods: Mapping[str, str],
    changes: Mapping[str, Any],
    folder: Path,
    say: Callable[[str], None],
) -> Trained:
    """Train networks of a configuration, with seed 0, and predict the test rows.

    Args:
        config: Its name.
        methods: Shown name to that in its contest.
        changes: Settings that differ, by dotted name.
        folder: For checkpoints.
        say: Tells the progress.
    """
    say(f"preparing rows of `{config}`")
    content = read_config(find_config(config, "video"))
    contest = Contest(**content["contest"])
    groups = {name: content[name] for name in ("model", "data", "trainer")}
    common = {**flatten(groups, ""), **changes}
    pieces = {}
    for shown, name in methods.items():
        further = contest.methods[name].get("settings", {})
        schema = data_of({**common, **further}).schema
        own = contest.settings(name, common, schema)
        pieces[shown] = Piece(name, 0, None, {**common, **own})
    made = Trained(data_of(pieces[HOME].settings), {}, {})
    test = made.data.batch("test")
    for shown in stepping("training", pieces, seconds=SHORT):
        say(f"training {shown}")
        ranker = ranker_of(
            pieces[shown].settings, train(pieces[shown], Job(folder / shown), {}), made.data
        )
        made.found[shown] = probabilities(ranker, test)
        made.reports[shown] = report_of(ranker, test)
    return made


def _add_bounds(trained: Trained) -> None:
    """Add what the duration alone predicts, and the true probabilities."""
    data = trained.data
    one = baseline({"kind": "one_column", "column": "duration_ms"}, data.transform)
    rows = data.batch("train"), data.batch("validation")
    trained.found[DURATION] = one.fit(*rows).predict(data.batch("test"))
    truth = oracle_of([data.table("test")], data.schema.task_names)
    trained.found[ORACLE] = truth[ORACLE][0]


def _faults(raw: Trained) -> TourRow:
    """Return which experts are healthy: all networks are judged by the same figures."""
    summaries = {method: report.summary() for method, report in raw.reports.items()}
    faults = {m: [n for n in HEALTHY if s[n] > HEALTHY[n]] for m, s in summaries.items()}
    rivals = [m for m in summaries if m != HOME]
    words = "; ".join(map(IN_WORDS.__getitem__, faults[HOME]))
    sound = " and ".join(m for m in rivals if not faults[m]) or "none"
    return TourRow(
        f"{HOME}, raw counts as inputs",
        "experts: largest over smallest scale, largest rate of outputs that are nearly 0, "
        "largest weight in a task's gate",
        _spread(summaries[HOME]),
        "; ".join(f"{m} {_spread(summaries[m])}" for m in rivals),
        f"{f'not healthy: {words}' if words else 'healthy'}; healthy rivals: {sound}",
    )


def _spread(summary: Mapping[str, float]) -> str:
    text = "{scale_ratio:.1f}x, {near_zero_rate_max:.0%}, {task_gate_weight_max:.0%}"
    return text.format(**summary)


def _accuracy(losses: Mapping[tuple[str, str], Row]) -> TourRow:
    own = losses[HOME, ""]
    rivals = (MMOE, DURATION)
    better = [m for m in rivals if losses[m, HOME].significant and losses[m, HOME].value > 0]
    worse = [m for m in rivals if losses[m, HOME].significant and losses[m, HOME].value < 0]
    same = [m for m in rivals if m not in (*better, *worse)]
    parts = [("better than", better), ("not distinguishable from", same), ("worse than", worse)]
    others = [f"{m} {losses[m, ''].value:.3f}" for m in (*rivals, ORACLE)]
    verdict = "; ".join(f"{words} {' and '.join(names)}" for words, names in parts if names)
    return TourRow(
        f"{HOME}, normalized inputs, rates not tuned",
        "log-loss, summed over 14 behaviors",
        f"{own.value:.3f} [{own.low:.3f}, {own.high:.3f}]",
        ", ".join(others),
        f"{verdict}; {ONE_SEED}",
    )


def _draw_faults(page: Page, raw: Trained, plain: Trained) -> None:
    reports = {f"{m}, raw counts": r for m, r in raw.reports.items()}
    reports |= {f"{m}, normalized": r for m, r in plain.reports.items()}
    caption = "Standard deviation of the outputs of every expert: collapse spreads them."
    page.figure(scales_figure(reports), caption)
    page.text(
        "A feed of 14 behaviors, simulated just now, and networks of the configuration `stress`, "
        "trained just now; each has the weights of HoME within 5 %. With raw, heavy-tailed counts "
        "among the inputs, plain ReLU experts drift apart in scale and output zeros, so that a "
        "gate cannot weigh them fairly. "
        "Normalized Swish experts do not; but the first gates of HoME read the raw counts, too, "
        "and may settle on one expert. With normalized counts, the default, less is left to cure."
    )
    for method, report in raw.reports.items():
        title = f"Mean weights of the gates of {method}, raw counts"
        page.figure(
            gates_figure(report, title=title), f"{method}, raw counts: mean weight of every gate."
        )


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
