"""Sentences of the docstrings of Python's standard library, labeled with their package."""

import ast
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence

from core_gates.errors import GatesError
from language.adapt.labeled_texts import LabeledTexts, Row, labeled
from language.corpus import PYTHON, Corpus, Document

CLASSES = 6
WORDS = 4  # of a sentence at least
END = re.compile(r"(?<=[.!?])\s")
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def sentences_of(documents: Sequence[Document]) -> LabeledTexts:
    """Return the first sentence of every docstring, labeled with the folder of its file.

    Files that `language.corpus.Corpus` has for validation or the test are held out. Only the
    packages with the most sentences are taken, and a sentence that two of them have is left out.

    Args:
        documents: Files of Python, by their paths.

    Raises:
        GatesError: Less than two packages have sentences for training and held out.
    """
    rows: dict[str, list[tuple[bool, Row]]] = {}
    for document in documents:
        package, slash, _ = document.name.partition("/")
        if slash and document.name.endswith(".py"):
            sentences = [Row((text,), package, document.name) for text in _sentences(document.text)]
            tested = Corpus.split(document.name) != "train"
            rows.setdefault(package, []).extend((tested, row) for row in sentences)
    both = {n: group for n, group in rows.items() if len({tested for tested, _ in group}) == 2}
    chosen = sorted(both, key=lambda name: (-len(both[name]), name))[:CLASSES]
    if len(chosen) < 2:
        raise GatesError(
            f"{len(chosen)} packages have docstrings for training and test, two are needed: give a"
            " folder of labeled texts by --data"
        )
    texts = {name: {row.texts for _, row in both[name]} for name in chosen}
    count = Counter(text for group in texts.values() for text in group)
    kept: tuple[dict[tuple[str, ...], Row], ...] = ({}, {})
    for tested, row in (pair for name in chosen for pair in both[name]):
        if count[row.texts] == 1 and row.texts not in kept[not tested]:
            kept[tested].setdefault(row.texts, row)
    return labeled(PYTHON, *(list(part.values()) for part in kept))


def _sentences(source: str) -> Iterator[str]:
    """Yield the first sentence of each docstring of a file that is not too short."""
    with warnings.catch_warnings(action="ignore"):  # of escapes in strings
        try:
            tree = ast.parse(source)
        except SyntaxError:
            return
    for node in ast.walk(tree):
        if isinstance(node, Documented) and (text := ast.get_docstring(node)):
            first = END.split(" ".join(text.split("\n\n")[0].split()))[0]
            if len(first.split()) >= WORDS:
                yield first
