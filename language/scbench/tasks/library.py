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


class Library(NamedTuple):
    """What is taken of the standard library.

    Attributes:
        functions: At the top level of modules, with a docstring.
        documents: Docstrings of modules and classes of some sentences, each once.
    """

    functions: tuple[Function, ...]
    documents: tuple[Document, ...]


@cache
def library() -> Library:
    """Return functions and documents, in the order of files; takes 2 seconds at the first call."""
    functions, texts = list[Function](), dict[str, str]()
    for path, tree, source in _modules():
        functions += _functions(path, tree, source)
        classes = (node for node in tree.body if isinstance(node, ast.ClassDef))
        named = [(path, ast.get_docstring(tree))]
        named += [(f"{path}:{node.name}", ast.get_docstring(node)) for node in classes]
        for name, text in named:
            texts.setdefault(" ".join((text or "").split()), name)
    names = Counter(function.name for function in functions)
    descriptions = Counter(function.description for function in functions)
    documents = (Document(name, tuple(END.split(text))) for text, name in texts.items())
    return Library(
        tuple(f for f in functions if names[f.name] == descriptions[f.description] == 1),
        tuple(
            document
            for document in documents
            if len(document.sentences) >= SENTENCES and max(map(len, document.sentences)) <= LETTERS
        ),
    )


def _modules() -> Iterator[tuple[str, ast.Module, str]]:
    """Yield path, tree and source of each module."""
    for document in read_corpus([PYTHON]).documents:
        if document.name.endswith(".py"):
            with warnings.catch_warnings(action="ignore"):  # of escapes in strings
                try:
                    tree = ast.parse(document.text)
                except SyntaxError:
                    continue
            yield document.name, tree, document.text


def _functions(path: str, tree: ast.Module, source: str) -> Iterator[Function]:
    """Yield the functions at the top level of a module that have a docstring."""
    lines = source.split("\n")
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
            body = lines[node.lineno - 1 : node.end_lineno]
            code, words = "\n".join(body), text.split("\n\n")[0].split()
            ends = len(body[-1].encode()) == node.end_col_offset  # without a comment after it
            fits = SHORTEST <= len(body) <= LONGEST and len(words) >= WORDS
            if fits and ends and "```" not in code:  # which would end the block of an answer
                yield Function(node.name, path, code, " ".join(words))
