"""``gates endoscopy evaluate``: render and train what is missing, score, write, print."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from apps.endoscopy.evaluation import Evaluation
from apps.endoscopy.honest import HonestTable
from apps.endoscopy.rendering import MAIN, SHIFTS, Rendering
from apps.endoscopy.scores import write_headline, write_part
from apps.endoscopy.training import Sizers, Training
from core_gates import GateMonitor
from core_gates.errors import GatesError
from endoscopy.bundles.building import frame_predictions
from endoscopy.data.datamodule import PolypSizingDataModule
from endoscopy.evaluation.size_evaluation import (
    HEADLINE,
    SECONDARY,
    TEST,
    Bars,
    SizeEvaluation,
    apart,
)
from endoscopy.training.variants import VARIANTS
from harness.experiment.markdown import write_markdown
from harness.experiment.printing import print_scores
from harness.experiment.scores import read_scores
from harness.files.atomic import write_bytes
from harness.report.gates import save_gates
from harness.runs.ticker import ticking

PREDICTIONS, MARKDOWN, SUBGROUPS = "predictions.parquet", "scores.md", "subgroups.parquet"
QUICK_RESAMPLES = 300


def render_missing(data: PolypSizingDataModule, rendering: Rendering, names: Sequence[str]) -> None:
    """Render the sets that are not there, saying so first; nothing for data of other kinds."""
    if "synthetic" not in data.sources:
        return
    missing = rendering.missing(data, names)
    if missing:
        sets = ", ".join(f"{one.name} of {one.objects} objects" for one in missing)
        print(f"rendered sets missing: {sets}; rendering them now", flush=True)
        rendering.render(data, names)


def score(
    sizers: Sizers,
    rendering: Rendering,
    config_path: Path | None,
    *,
    variants: Sequence[str],
    seeds: Sequence[int],
    folds: Sequence[int],
    shifts: Sequence[str],
    bars: Bars,
    quick: bool,
) -> Path:
    """Score every variant and write scores, tables and what the report is drawn from."""
    _check(variants, shifts)
    evaluation = Evaluation(
        sizers,
        variants,
        seeds,
        folds,
        sizers.module.cut_offs,
        QUICK_RESAMPLES if quick else 2000,
        cues=not quick,
    )
    shifts = () if quick else tuple(shifts)
    missing = sizers.missing(evaluation.trainings())
    if missing:
        names, then = sizers.reasons(missing), "left out" if quick else "training them now"
        print(f"weights missing: {names}; {then}")
    if quick:
        evaluation = _without(evaluation, missing)
    render_missing(sizers.datamodule, rendering, (MAIN, *shifts))
    sizers.datamodule.setup("test")
    sizers.train_missing(evaluation.trainings())
    evaluation.run(rendering, shifts)
    folder, scores = sizers.run_folder.path, evaluation.scores
    write_bytes(folder / PREDICTIONS, scores.table().to_parquet(None, index=False))
    with ticking("bootstrap", len(scores.pairs())) as tick:
        rows = scores.rows(tick)
    opening = [scores.headline, scores.note]
    write_headline(folder, *opening)
    watch_gates(evaluation, folder)
    write_subgroups(scores, folder)
    met_or_missed = [] if quick or sizers.pinned else scores.bars(bars)
    path = write_part(
        sizers.run_folder.scores,
        audit=False,
        config_path=config_path,
        seeds=evaluation.seeds,
        rows=rows,
        bars=met_or_missed,
    )
    shown = apart([row for row in rows if row.metric in HEADLINE])
    shown += [
        row._replace(task=f"{TEST}, other scores")
        for row in rows
        if row.task == TEST and row.metric in SECONDARY
    ]
    write_markdown(folder / MARKDOWN, opening, shown, met_or_missed)
    print("\n".join(opening))
    print_scores(path, read_scores(path, "endoscopy"), metrics=HEADLINE)
    return path


def score_honest(table: HonestTable, config_path: Path | None, rendering: Rendering) -> Path:
    """Run the honest table's missing trainings, and write and print the comparison."""
    sizers = table.sizers
    missing = table.missing()
    if missing:
        reason = table.reason(missing)
        why = f" ({reason})" if reason else ""
        print(f"{table.named(missing)}{why}; training them now", flush=True)
        render_missing(sizers.datamodule, rendering, (MAIN,))
        table.run()
    table.tuning.keep()
    folder = sizers.run_folder.path
    scores, note = table.scores, f"{table.steps} optimizer steps of every training."
    write_bytes(folder / "honest.parquet", scores.table.to_parquet(None, index=False))
    rows = scores.rows()
    write_headline(folder, scores.headline, note)
    path = write_part(
        sizers.run_folder.scores,
        audit=False,
        config_path=config_path,
        seeds=table.seeds,
        rows=rows,
        bars=[],
    )
    write_markdown(folder / MARKDOWN, [scores.headline, note], rows)
    print(scores.headline)
    print_scores(path, read_scores(path, "endoscopy"))
    return path


def write_subgroups(scores: SizeEvaluation, folder: Path) -> None:
    """Keep the scores of subgroups, or remove those of an earlier evaluation."""
    table = scores.subgroups()
    if table is None:
        (folder / SUBGROUPS).unlink(missing_ok=True)
    else:
        write_bytes(folder / SUBGROUPS, table.to_parquet(None, index=False))


def watch_gates(evaluation: Evaluation, folder: Path) -> None:
    """Keep the values of the gates of the first seed on some test frames."""
    bundle, data = evaluation.bundles()[0], evaluation.sizers.datamodule
    rows = data.evaluation_rows("test")[:64]
    with GateMonitor(bundle.model) as monitor:
        frame_predictions(bundle, data.frames(), rows)
        save_gates(monitor, folder)


def _without(evaluation: Evaluation, missing: Sequence[Training]) -> Evaluation:
    """Return an evaluation of the seeds and variants that are there."""
    lacking = {(one.variant, one.seed) for one in missing}
    seeds = [s for s in evaluation.seeds if (evaluation.main, s) not in lacking]
    if not seeds:
        raise GatesError(
            f"no trained network of {evaluation.main} is there: run fit, or evaluate without "
            "--quick, which trains"
        )
    variants = [v for v in evaluation.variants if not any((v, s) in lacking for s in seeds)]
    return Evaluation(
        evaluation.sizers,
        variants,
        seeds,
        [fold for fold in evaluation.folds if fold is not None],
        evaluation.scores.cut_offs,
        evaluation.scores.resamples,
        evaluation.cues,
    )


def _check(variants: Sequence[str], shifts: Sequence[str]) -> None:
    for kind, names, known in (("variants", variants, VARIANTS), ("shifts", shifts, SHIFTS)):
        unknown = [name for name in names if name not in known]
        if unknown:
            raise GatesError(
                f"evaluate.{kind} {', '.join(unknown)} is unknown: choose from {', '.join(known)}"
            )
    if not variants:
        raise GatesError("evaluate.variants is empty: name configured, or another variant")
