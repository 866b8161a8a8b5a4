"""The language stop of the tour: a decoder and counts of bytes complete a function."""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from apps.language.generate import SHIPPED_CONFIG, models_in, shipped
from apps.language.offload.expert_tour import ExpertPart, expert_part
from apps.language.scbench.cache_tour import CachePart, cache_part
from apps.language.seer.tour import GATES, BlockPart, block_part
from apps.language.seqboat.digit_tour import digit_part
from harness.evidence import Resamples, compare, moments
from harness.report.page import Page, StopSkippedError, TourRow, TourStop, TourTask
from language.corpus import Document, read_corpus
from language.counts import ORDER, ByteCounts
from language.decoder import Decoder
from language.generation import generate
from language.hf.model_folder import read_model
from language.scoring import bits_per_byte, count_bits, ratio, scored_part
from language.tokenizer import ByteTokenizer

FILES, LETTERS = 8, 2000  # held-out files, and the letters at their beginning that are scored
ADDED = 200  # bytes of a completion
TEMPERATURE = 0.2  # of the decoder; counts that are as sharp repeat spaces
FUNCTION = re.compile(r"^def [^\n]+\n( +[^\n]+\n){4,}", re.MULTILINE)
LINES = 2  # of a function, which are the prompt
ASCII = 128
DECODER, REFERENCE = "decoder", f"order {ORDER}"  # as the scores of bytes call them


def tour(
    folder: Path,
    say: Callable[[str], None],
    *,
    weights: Path | None = None,
    corpus: Sequence[str] = ("python",),
) -> TourStop:
    """Complete a function of a held-out file, by the decoder that ships and by counts of bytes.

    Then show which blocks of keys gates choose, what answers are left when a cache is compressed,
    which experts a mixture needs, and which tokens of a spoken digit attend.

    Args:
        folder: For files.
        say: Reports the progress.
        weights: Folder of a decoder of bytes; what ships if None.
        corpus: Files and folders of text.

    Raises:
        StopSkippedError: No weights ship.
    """
    found = [weights] if weights else models_in(shipped())
    if not found:
        raise StopSkippedError(
            f"language: no weights ship: `gates language fit --config {SHIPPED_CONFIG}` trains some"
        )
    model, _ = read_model(found[0])
    documents = read_corpus(corpus)
    say(f"counting bytes of {len(documents.part('train'))} files")
    counts = ByteCounts.fit(documents.part("train"))
    held = documents.part("test")
    say("completing a function")
    texts, completed = _completions(model, held, counts)
    say(f"scoring the beginnings of {min(FILES, len(held))} files")
    beginnings = [Document(one.name, one.text[:LETTERS]) for one in held[:FILES]]
    tokenizer = ByteTokenizer()
    scored, starts = scored_part(tokenizer, beginnings, model.context)
    bits = {
        DECODER: bits_per_byte(model, tokenizer, scored),
        REFERENCE: count_bits(counts, scored, starts)[-1],
    }

    parts: list[BlockPart | CachePart | ExpertPart] = []
    drawings: list[Callable[[Page], object]] = []
    done = [completed]
    if weights is None:
        say("choosing blocks of keys")
        gates = shipped().parent / GATES  # of the decoder that ships
        parts.append(block_part(found[0], gates, tokenizer, beginnings))
        say("asking one context five times")
        parts.append(caches := cache_part())
        say("reading experts from disk")
        parts.append(experts := expert_part(held, folder))
        say("hearing a digit")
        digit, drawings = digit_part()
        done += [caches.done, experts.done, digit]
    drawings = [*(one.draw for one in reversed(parts)), *drawings]
    draw = partial(_draw, texts=texts, drawings=drawings)
    rows = [_row(bits), *(one.row for one in parts)]
    return TourStop("Language: a small decoder", rows, draw, done)


def _completions(
    model: Decoder, held: Sequence[Document], counts: ByteCounts
) -> tuple[dict[str, str], TourTask]:
    """Return the first function of documents and its completions, and what the decoder did."""
    function = next(one for text in held for one in FUNCTION.finditer(text.text))[0]
    prompt, tokenizer = "".join(function.splitlines(keepends=True)[:LINES]), ByteTokenizer()
    started = time.monotonic()
    chunks = generate(
        model, [[tokenizer.end, *tokenizer.encode(prompt)]], decode=tokenizer.decode,
        max_tokens=ADDED, temperature=TEMPERATURE, end=tokenizer.end,
    )  # fmt: skip
    added = "".join(chunk.text for chunk in chunks)
    spent = time.monotonic() - started
    texts = {"the file": function, DECODER: prompt + added}
    texts[REFERENCE] = prompt + drawn(counts, prompt, ADDED)
    return texts, TourTask(
        "complete a function",
        f"continues with `{(added.strip() or 'nothing').splitlines()[0]}`",
        "gates language generate",
        spent,
    )


def _draw(
    page: Page,
    texts: Mapping[str, str],
    drawings: Sequence[Callable[[Page], object]],
) -> None:
    """Add the drawings, and completions by what they are from."""
    for add in drawings:
        add(page)
    page.text(
        "A function of a file that neither has seen, completed from its first lines byte by "
        f"byte: one sample, of the decoder at temperature {TEMPERATURE}, of counts at 1, as "
        "sharper counts repeat spaces. Counts are of the bytes after up to five others, of the "
        "same training files."
    )
    for name, text in texts.items():
        page.text(f"**{name}**").code(text)


def drawn(counts: ByteCounts, prompt: str, length: int) -> str:
    """Return a prompt's continuation, ASCII letters drawn one by one from adaptive counts."""
    text, generator = prompt, np.random.default_rng(0)
    for _ in range(length):
        known = text[-counts.order :] if counts.order else ""
        every = "".join(known + chr(letter) for letter in range(ASCII))
        bits = counts.bits(every)[-1, len(known) :: len(known) + 1]
        weights = np.exp2(bits.min() - bits)
        text += chr(int(generator.choice(ASCII, p=weights / weights.sum())))
    return text[len(prompt) :]


def _row(bits: dict[str, np.ndarray]) -> TourRow:
    scores = {method: moments(own, ratio) for method, own in bits.items()}
    draws = Resamples.clusters(range(len(bits[DECODER])))
    own, rival, gap = compare(scores, draws, task="", reference=REFERENCE)
    better, worse = gap.high < 0, gap.low > 0
    return TourRow(
        "decoder, shipped",
        f"bits per byte, beginnings of {own.n} unseen files",
        f"{own.value:.2f} [{own.low:.2f}, {own.high:.2f}]",
        f"counts of {REFERENCE} {rival.value:.2f}",
        "better than counts" if better else "worse than counts" if worse else "not distinguishable",
    )
