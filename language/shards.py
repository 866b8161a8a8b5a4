"""Tokens of a corpus in memory maps, one per split, and an index that accounts for every byte."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core_gates.errors import GatesError
from harness.files.atomic import locked, replacing, write_bytes
from harness.files.digest import LISTED_ABOVE
from harness.files.digest import sha256 as file_digest
from language.corpus import SPLITS, Corpus, Split
from language.tokenizer import FILE, Tokenizer, faithful_tokens, load_tokenizer

INDEX = "index.json"
VERSION = 1
KINDS: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
AGAIN = "remove the folder and prepare the corpus again"


class Part(NamedTuple):
    """What the index knows of a split.

    Attributes:
        tokens: Number of tokens, those between documents included.
        sha256: Of the memory map, hexadecimal.
        bytes: Bytes of all texts in UTF-8.
        digest: Hexadecimal SHA-256 of names and texts, see `Corpus.digest`.
        documents: Name, first token, and the token after the last one of every document.
        objects: The first 12 hexadecimal digits of the SHA-256 of every text.
    """

    tokens: int
    sha256: str
    bytes: int
    digest: str
    documents: list[tuple[str, int, int]]
    objects: list[str]


class ShardSet:
    """A folder with ``train.bin``, ``validation.bin``, ``test.bin``, an index and the tokenizer.

    The end comes before and after each document: tokens ``start - 1`` and ``stop`` of it are ends.

    Args:
        folder: Where it is.
        content: Of the index.

    Attributes:
        digest: Hexadecimal SHA-256 of the index, thus of corpus, tokenizer and tokens.
        corpus_digest: `Corpus.digest` of what was packed.

    Raises:
        ValueError: The index is damaged.
    """

    def __init__(self, folder: Path, content: bytes) -> None:
        self.folder, self.digest = folder, sha256(content).hexdigest()
        try:
            index = json.loads(content)
            if index["version"] != VERSION:
                raise ValueError(f"version {index['version']}, expected {VERSION}")
            self._kind = KINDS[index["dtype"]]
            self.corpus_digest = str(index["corpus"])
            self._tokenizer_digest = str(index["tokenizer"])
            self._parts = {split: _part(index["splits"][split]) for split in SPLITS}
        except (TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error

    @classmethod
    def open(cls, folder: str | Path) -> ShardSet:
        """Open a folder and check it; memory maps above 1 GB by their sizes alone.

        Raises:
            GatesError: There are no shards, the index is damaged, or a memory map or the tokenizer
                is not the one that the index describes.
        """
        path = Path(folder) / INDEX
        try:
            opened = cls(Path(folder), path.read_bytes())
        except OSError as error:
            raise GatesError(
                f"{folder} holds no shards ({error.strerror}): prepare the corpus there first"
            ) from error
        except ValueError as error:
            raise GatesError(f"{path} is damaged ({error}): {AGAIN}") from error
        for split in SPLITS:
            opened._check(split)
        assert opened.tokenizer
        return opened

    def _check(self, split: Split) -> None:
        """Refuse a memory map of another size or content."""
        path, part = self._path(split), self.part(split)
        expected = part.tokens * self._kind.itemsize
        size = path.stat().st_size if path.is_file() else 0
        if size != expected:
            raise GatesError(f"{path} has {size} bytes, expected {expected}: {AGAIN}")
        if size <= LISTED_ABOVE and file_digest(path) != part.sha256:
            raise GatesError(f"{path} is damaged, its SHA-256 is not that of {INDEX}: {AGAIN}")

    def _path(self, split: Split) -> Path:
        return self.folder / f"{split}.bin"

    def part(self, split: Split) -> Part:
        """Return what the index knows of a split: sizes, digests, where each document lies."""
        return self._parts[split]

    def tokens(self, split: Split) -> np.memmap[Any, np.dtype[Any]]:
        """Return the tokens (T,) of a split, uint16 or uint32, which cannot be changed."""
        return np.memmap(self._path(split), self._kind, "r")

    def documents(self, split: Split) -> list[tuple[str, int, int]]:
        """Return name, first token, and the token after the last one of every document."""
        return self.part(split).documents

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the tokens are from.

        Raises:
            GatesError: Its file is damaged, or another one.
        """
        loaded = load_tokenizer(self.folder)
        if loaded.digest != self._tokenizer_digest:
            raise GatesError(f"{self.folder / FILE} is not that of {INDEX}: {AGAIN}")
        return loaded


def _part(fields: dict[str, Any]) -> Part:
    """Return the entry of a split.

    Raises:
        TypeError: It has other fields, or values of other types.
        ValueError: Its documents overlap or lie outside of the tokens.
    """
    part = Part(**fields)
    for name, kind in (("tokens", int), ("bytes", int), ("sha256", str), ("digest", str)):
        if type(getattr(part, name)) is not kind:
            raise TypeError(f"{name} is not {kind.__name__}")
    last, documents = 0, []
    for name, start, stop in part.documents:
        if not (isinstance(name, str) and type(start) is type(stop) is int):
            raise TypeError("a document is not a name and two numbers")
        if not last < start <= stop < part.tokens:
            raise ValueError(f"document {name[:60]!r} has tokens {start} to {stop}")
        last = stop
        documents.append((name, start, stop))
    objects = [str(shard) for shard in part.objects]
    if len(objects) != len(documents):
        raise ValueError(f"{len(documents)} documents and {len(objects)} objects")
    return part._replace(documents=documents, objects=objects)


def write_shards(
    corpus: Corpus,
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    tick: Callable[[], None] = lambda: None,
) -> ShardSet:
    """Pack a corpus; the folder is there once it is whole, and replaces earlier shards.

    Args:
        corpus: What is packed, document by document.
        tokenizer: What makes its tokens.
        folder: Where shards are written.
        tick: Called after every document.

    Raises:
        GatesError: The folder holds something else or cannot be written, another process is at
            work on it, or the tokenizer loses text of a document.
    """
    folder = Path(folder)
    taken = folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))
    if taken and not (folder / INDEX).is_file():
        raise GatesError(f"{folder} exists and holds no shards: choose another folder")
    kind = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    lock = folder.with_name(f".{folder.name}.lock")
    with locked(lock, folder, "choose another folder"), replacing(folder) as temporary:
        temporary.mkdir()
        tokenizer.save(temporary)
        index = {
            "version": VERSION,
            "dtype": kind,
            "corpus": corpus.digest,
            "tokenizer": tokenizer.digest,
            "splits": {
                split: _write(
                    Corpus(corpus.part(split)), tokenizer, temporary / f"{split}.bin", kind, tick
                )._asdict()
                for split in SPLITS
            },
        }
        write_bytes(temporary / INDEX, json.dumps(index, sort_keys=True).encode())
    return ShardSet.open(folder)


def _write(
    corpus: Corpus, tokenizer: Tokenizer, path: Path, kind: str, tick: Callable[[], None]
) -> Part:
    """Write the memory map of the documents of one split."""
    documents: list[tuple[str, int, int]] = []
    objects: list[str] = []
    position, size = 1, 0
    with path.open("wb") as file:
        file.write(np.array([tokenizer.end], KINDS[kind]).tobytes())
        for name, text in corpus.documents:
            tokens, content = faithful_tokens(tokenizer, name, text), text.encode()
            file.write(np.append(tokens, tokenizer.end).astype(KINDS[kind]).tobytes())
            documents.append((name, position, position + len(tokens)))
            objects.append(sha256(content).hexdigest()[:12])
            position += len(tokens) + 1
            size += len(content)
            tick()
    return Part(position, file_digest(path), size, corpus.digest, documents, objects)
