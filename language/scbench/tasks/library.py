"""Python's standard library as text: its functions and what is written about its modules."""

from __future__ import annotations

import ast
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from language.corpus import PYTHON, read_corpus

SHORTEST, LONGEST = 4, 40  # lines of a function
WORDS = 5  # of a description at least
SENTENCES = 4  # of a document at least
LETTERS = 300  # of a sentence at most
END = re.compile(r"(?<=[.!?])\s+")


class Function(NamedTuple):
    """A function of a module.

    Attributes:
        name: Its name, which no other one has.
        path: File of the module.
        code: Its source, docstring included.
        description: First paragraph of the docstring, in one line; no other one has it.
    """

    name: str
    path: str
    code: str
    description: str


class Document(NamedTuple):
    """A text about a module or a class.

    Attributes:
        name: File of the module, of a class with its name.
        sentences: The sentences of its docstring. They end with white space after . ! or ?
    """

    name: str
    sentences: tuple[str, ...]


@cache
def functions() -> tuple[Function, ...]:
    """Return the functions at the top level of all modules that have a docstring."""
    all_of_them = [f for path, tree, source in _modules() for f in _functions(path, tree, source)]
    names = Counter(function.name for function in all_of_them)
    descriptions = Counter(function.description for function in all_of_them)
    return tuple(f for f in all_of_them if names[f.name] == descriptions[f.description] == 1)


@cache
def documents() -> tuple[Document, ...]:
    """Return the docstrings of modules and classes that have some sentences, each once."""
    texts: dict[str, str] = {}
    for path, tree, _ in _modules():
        classes = (node for node in tree.body if isinstance(node, ast.ClassDef))
        named = [(path, ast.get_docstring(tree))]
        named += [(f"{path}:{node.name}", ast.get_docstring(node)) for node in classes]
        for name, text in named:
            texts.setdefault(" ".join((text or "").split()), name)
    split = (Document(name, tuple(END.split(text))) for text, name in texts.items())
    whole = (document for document in split if max(map(len, document.sentences)) <= LETTERS)
    return tuple(document for document in whole if len(document.sentences) >= SENTENCES)


def _modules() -> Iterator[tuple[str, ast.Module, str]]:
    """Yield path, tree and source of each module."""
    for document in read_corpus([PYTHON]).documents:
        if document.name.endswith(".py"):
            with warnings.catch_warnings(action="ignore"):  # of escapes in strings
                try:
                    yield document.name, ast.parse(document.text), document.text
                except SyntaxError:
                    continue


def _functions(path: str, tree: ast.Module, source: str) -> Iterator[Function]:
    """Yield the functions at the top level of a module that have a docstring."""
    lines = source.split("\n")
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
            code = "\n".join(lines[node.lineno - 1 : node.end_lineno])
            words = text.split("\n\n")[0].split()
            fits = SHORTEST <= code.count("\n") + 1 <= LONGEST and len(words) >= WORDS
            if fits and "```" not in code:
                yield Function(node.name, path, code, " ".join(words))
