"""Text to tokens and back: the 256 bytes, or any ``tokenizer.json`` of Hugging Face."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from core_gates.errors import GatesError
from harness.files.atomic import write_bytes

BYTES = "bytes"
FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
END = "<|endoftext|>"
ENDS = (END, "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>", "[SEP]")
"""Tokens that end a document, the first one known is taken where no configuration names one."""

MOST = 2**24  # ids, far above those of any model
BYTE = re.compile(r"<0x([0-9A-F]{2})>")
"""A token of a vocabulary of characters that stands for one byte."""


class Tokenizer(Protocol):
    """What turns text into tokens.

    Attributes:
        vocab_size: Number of ids; every token is below it.
        end: Token between documents, which every prompt starts with; no text contains it.
        digest: Hexadecimal SHA-256 of the ``tokenizer.json``, and of the end where that is not the
            one taken without a configuration.
    """

    vocab_size: int
    end: int
    digest: str

    def encode(self, text: str) -> NDArray[np.int64]:
        """Return the tokens (T,) of a text, without any that mark its beginning or its end."""

    def byte_counts(self, text: str) -> NDArray[np.int64]:
        """Return the number of bytes (T,) that each token of ``encode(text)`` stands for.

        They add up to the bytes of the text in UTF-8. What a tokenizer drops counts with the token
        before it, and a character of several tokens, where their bytes are unknown, with its last.
        """

    def decode(self, tokens: Sequence[int]) -> bytes:
        """Return the bytes of tokens; special ones, such as the end, have none.

        Raises:
            ValueError: A token is not in the vocabulary.
        """

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.json``, and what transformers needs next to it, atomically."""


def load_tokenizer(name: str | Path) -> Tokenizer:
    """Load ``bytes``, a ``tokenizer.json``, or that in a folder; no name of the Hub.

    Args:
        name: ``bytes``, a ``tokenizer.json``, or a folder that holds one.

    Raises:
        GatesError: It is none of these, or damaged.
    """
    if name == BYTES:
        return ByteTokenizer()
    path = Path(name)
    if path.is_dir() and not (path / FILE).is_file():
        raise GatesError(f"{path} has no {FILE}: put that of the model into the folder")
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise GatesError(
            f"tokenizer {name} is not found: name {BYTES!r}, a {FILE}, or a folder that holds one"
        )
    if path.stat().st_size == len(_bytes_json()) and path.read_bytes() == _bytes_json():
        return ByteTokenizer()
    return FileTokenizer(path)


def faithful_tokens(tokenizer: Tokenizer, name: str, text: str) -> NDArray[np.int64]:
    """Return the tokens (T,) of a document, from which its text can be told.

    A space at its beginning, which some tokenizers add or drop, may differ.

    Args:
        tokenizer: Makes the tokens.
        name: Of the document, for the message.
        text: What it holds.

    Raises:
        GatesError: Other texts have the same tokens, so that bits per byte would be too few.
    """
    tokens, content = tokenizer.encode(text), utf8(text)
    decoded = tokenizer.decode(tokens)  # type: ignore[arg-type]
    if decoded.removeprefix(b" ") != content.removeprefix(b" "):
        pairs = enumerate(zip(decoded, content, strict=False))
        place = next((n for n, (a, b) in pairs if a != b), min(len(decoded), len(content)))
        here = slice(place, place + 20)
        raise GatesError(
            f"the tokenizer loses text: {name} comes back with {decoded[here]!r} at byte {place}, "
            f"expected {content[here]!r}; leave the file out, or name a tokenizer that keeps every "
            f"byte, such as {BYTES!r}"
        )
    return tokens


def utf8(text: str) -> bytes:
    """Return a text in UTF-8.

    Raises:
        GatesError: It holds half a surrogate pair, which is not a character.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise GatesError(
            f"a text holds {text[error.start]!r} at character {error.start}, which is half a "
            "character: give valid Unicode"
        ) from error


class ByteTokenizer:
    """One token per byte of the text in UTF-8, and the end."""

    vocab_size = 257
    end = 256

    def __init__(self) -> None:
        self.digest = sha256(_bytes_json()).hexdigest()

    def encode(self, text: str) -> NDArray[np.int64]:
        """Return the bytes (T,) of a text."""
        return np.frombuffer(utf8(text), np.uint8).astype(np.int64)

    def byte_counts(self, text: str) -> NDArray[np.int64]:
        """Return ones (T,)."""
        return np.ones(len(utf8(text)), np.int64)

    def decode(self, tokens: Sequence[int]) -> bytes:
        """Return the tokens as bytes, ends left out."""
        checked = np.array(_known(tokens, self.vocab_size), np.int64)
        return checked[checked != self.end].astype(np.uint8).tobytes()

    def save(self, folder: Path) -> None:
        """Write a ``tokenizer.json`` that gives the same tokens."""
        write_bytes(folder / FILE, _bytes_json())
        write_bytes(folder / CONFIG, _config_json(END))


class FileTokenizer:
    """The tokenizer of a ``tokenizer.json``; truncation and padding that it asks for are left out.

    Text that spells a special token is text.

    Args:
        path: The file. Its end is the ``eos_token`` of a ``tokenizer_config.json`` next to it, or
            else the first of `ENDS` in the vocabulary.

    Raises:
        MissingExtraError: The package ``tokenizers`` is not installed.
        GatesError: The file cannot be read, is not a tokenizer, or has no end.
    """

    def __init__(self, path: str | Path) -> None:
        import tokenizers

        self._path = path = Path(path)
        try:
            self._content = path.read_bytes()
            self._tokenizer = tokenizers.Tokenizer.from_str(self._content.decode())
            ids: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
            self.vocab_size = max(ids.values(), default=-1) + 1
            if self.vocab_size > MOST:
                raise ValueError(f"token {self.vocab_size - 1}, expected ids below {MOST}")
        except BaseException as error:  # where the package panics, as well
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise GatesError(
                f"{path} cannot be read as a tokenizer ({' '.join(str(error).split())}): name a "
                f"{FILE} of the package tokenizers"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        end, self._config = _end_and_config(path, ids)
        self.end = ids[end]
        named = b"" if end == _first_end(ids) else b"\0" + end.encode()  # no JSON holds a zero byte
        self.digest = sha256(self._content + named).hexdigest()
        self._pieces = self._bytes_of_tokens(ids)
        self._fallback = {
            n: int(match[1], 16) for t, n in ids.items() if (match := BYTE.fullmatch(t))
        }

    def _bytes_of_tokens(self, ids: dict[str, int]) -> list[bytes] | None:
        """Return the bytes of each token of a vocabulary of bytes; None for one of characters."""
        if '"ByteLevel"' not in json.dumps(json.loads(self._content).get("decoder")):
            return None
        values = {letter: byte for byte, letter in enumerate(_letters())}
        pieces = [b""] * self.vocab_size
        for token, number in ids.items():
            mapped = all(letter in values for letter in token)
            pieces[number] = bytes(values[letter] for letter in token) if mapped else token.encode()
        for number, added in self._tokenizer.get_added_tokens_decoder().items():
            pieces[number] = b"" if added.special else added.content.encode()
        return pieces

    def encode(self, text: str) -> NDArray[np.int64]:
        """Return the tokens (T,) of a text.

        Raises:
            GatesError: The vocabulary has no token for a part of it, nor for unknown parts.
        """
        return np.array(self._encoding(text).ids, np.int64)

    def _encoding(self, text: str) -> Any:
        utf8(text)
        try:
            return self._tokenizer.encode(text, add_special_tokens=False)
        except Exception as error:  # what the package raises has no narrower type
            raise GatesError(
                f"{self._path} cannot encode a text ({error}): name another tokenizer"
            ) from error

    def byte_counts(self, text: str) -> NDArray[np.int64]:
        """Return the bytes (T,) of each token, see `Tokenizer.byte_counts`."""
        size, encoded = len(utf8(text)), self._encoding(text)
        if self._pieces is not None:
            counts = np.array([len(self._pieces[token]) for token in encoded.ids], np.int64)
            if counts.sum() == size:  # not where it adds or drops a space
                return counts
        lengths = np.frombuffer(text.encode("utf-32-le"), "<u4")
        lengths = 1 + (lengths >= 0x80) + (lengths >= 0x800) + (lengths >= 0x10000)
        places = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        starts = places[[start for start, _ in encoded.offsets[1:]]]
        bounds = np.maximum.accumulate(np.concatenate([[0], starts, [size]]))
        return np.diff(bounds)[: len(encoded.ids)]

    def decode(self, tokens: Sequence[int]) -> bytes:
        """Return the bytes of tokens; those of a last, incomplete character as they are."""
        tokens = _known(tokens, self.vocab_size)
        if self._pieces is not None:
            return b"".join(self._pieces[token] for token in tokens)
        whole = len(tokens)
        while whole and tokens[whole - 1] in self._fallback:
            whole -= 1
        text: str = self._tokenizer.decode(tokens[:whole], skip_special_tokens=True)
        return text.encode() + bytes(self._fallback[token] for token in tokens[whole:])

    def save(self, folder: Path) -> None:
        """Write a copy of the file, and the configuration next to it."""
        write_bytes(folder / FILE, self._content)
        write_bytes(folder / CONFIG, self._config)


def _end_and_config(path: Path, ids: dict[str, int]) -> tuple[str, bytes]:
    """Return the end of a tokenizer, and the configuration that names it.

    Raises:
        GatesError: The configuration next to it is damaged, or there is no end.
    """
    place, config, named = path.with_name(CONFIG), b"", None
    if place.is_file():
        try:
            config = place.read_bytes()
            named = json.loads(config).get("eos_token")
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise GatesError(
                f"{place} cannot be read as JSON: {error}; fix or remove it"
            ) from error
    named = named.get("content") if isinstance(named, dict) else named
    end = named if isinstance(named, str) and named in ids else _first_end(ids)
    if end is None:
        raise GatesError(
            f"{path} has no token that ends a document: name one of its tokens as eos_token in a "
            f"{CONFIG} next to it"
        )
    return end, config or _config_json(end)


def _first_end(ids: dict[str, int]) -> str | None:
    """Return the end that a vocabulary has where no configuration names one."""
    return next((end for end in ENDS if end in ids), None)


def _known(tokens: Sequence[int], vocab_size: int) -> list[int]:
    """Return tokens as plain integers.

    Raises:
        ValueError: One is not in the vocabulary.
    """
    plain: list[int] = np.asarray(tokens, np.int64).tolist()
    if plain and not 0 <= min(plain) <= max(plain) < vocab_size:
        raise ValueError(f"tokens must be in 0..{vocab_size - 1}, got {min(plain)}..{max(plain)}")
    return plain


def _letters() -> list[str]:
    """Return the letter that stands for each byte in byte-level vocabularies, those of GPT-2.

    Printable letters of Latin-1 stand for themselves, all others, in order, for those from U+0100.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(0x100)]


@cache
def _bytes_json() -> bytes:
    """Return the ``tokenizer.json`` of `ByteTokenizer`: a byte-level BPE without merges."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    vocabulary = {letter: byte for byte, letter in enumerate(_letters())}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": len(vocabulary), "content": END, **plain, "special": True}],
        "normalizer": None,
        "pre_tokenizer": level | {"use_regex": False},
        "post_processor": None,
        "decoder": level | {"use_regex": False},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    return json.dumps(content, ensure_ascii=False).encode()


def _config_json(end: str) -> bytes:
    """Return a configuration with which transformers uses the ``tokenizer.json`` as it is."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end}
    return json.dumps(config | {"clean_up_tokenization_spaces": False}, indent=2).encode() + b"\n"
