from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pytest
from torch import nn

from apps.main import App, main
from harness.command.parser import is_plain_sequence, kind, plain


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("``fixed`` gain, or ``agc``.", "fixed gain, or agc."),
        ("see :class:`~core_gates.moe.layer.MoELayer` for more", "see MoELayer for more"),
        ("of :func:`harness.files.digest.sha256`.", "of harness.files.digest.sha256."),
        ("the :py:class:`thing <a.b.Thing>` here", "the thing here"),
        ("a `page <https://a.b/c>`_ and `word`", "a page (https://a.b/c) and word"),
        ("**bold**\n    and  wrapped", "bold and wrapped"),
        ("2 * 3 ** 4", "2 * 3 ** 4"),
    ],
)
def test_markup_is_stripped(text, expected):
    assert plain(text) == expected


@pytest.mark.parametrize(
    ("hint", "word"),
    [
        (int, "INT"),
        (str | None, "TEXT"),
        (int | float, "INT|FLOAT"),
        (Path, "PATH"),
        (bool, "{true,false}"),
        (Literal["a", "b"], "{a,b}"),
        (Literal["a", "b"] | None, "{a,b}"),
        (tuple[int, ...], "INT,..."),
        (tuple[int, float], "INT,FLOAT"),
        (Sequence[str], "TEXT,..."),
        (Sequence[nn.Module], "Module,..."),
        (nn.Module, "Module"),
        (dict[str, int], "MAPPING"),
    ],
)
def test_a_type_is_one_word(hint, word):
    assert kind(hint) == word


@pytest.mark.parametrize(
    ("hint", "found"),
    [
        (tuple[int, ...], True),
        (list[str] | None, True),
        (Sequence[Literal["a"]], True),
        (str, False),
        (tuple[nn.Module, ...], False),
        (dict[str, int], False),
        (int | list[int], False),
        (tuple[tuple[int, int], ...], False),
    ],
)
def test_sequences_of_plain_items_are_told_apart(hint, found):
    assert is_plain_sequence(hint) is found


def test_the_help_of_a_class_is_plain_too(toy, capsys, monkeypatch):
    class Part:
        """A part, see :class:`toy.ToyModule`.

        Args:
            size: Its ``size``.
            rate: Its rate.
            scale: Its scale.
        """

        def __init__(self, size: int = 3, rate: float = 1e15, scale: float = 1.0) -> None:
            self.size = size

    class Parts(toy.ToyModule):
        """Made of a part.

        Args:
            part: The part.
            layer: Any layer.
        """

        def __init__(self, part: Part, dim: int = 8, layer: nn.Module | None = None) -> None:
            super().__init__(dim)

    Part.__module__, Part.__qualname__ = "toy", "Part"
    monkeypatch.setattr(toy, "Part", Part, raising=False)
    monkeypatch.setattr(toy, "ToyModule", Parts)
    table = {"toy": App("toy", "", {"fit": "x"})}
    with pytest.raises(SystemExit):
        main(["toy", "fit", "--help"], table)
    text = capsys.readouterr().out
    assert "  --model.part Part                 The part. (required; known: Part)\n" in text
    assert "  --model.layer Module              Any layer. (default: null)\n" in text
    assert text.endswith("\n--OPTION.help CLASS lists what the class of an option takes.\n")
    with pytest.raises(SystemExit):
        main(["toy", "fit", "--model.part.help", "toy.Part"], table)
    text = capsys.readouterr().out
    assert "A part, see toy.ToyModule:\n" in text
    assert "  --model.part.size INT             Its size. (default: 3)\n" in text
    assert "(default: 1e15)\n" in text
    assert "(default: 1.0)\n" in text
