import pytest
from torch import nn

from apps.main import App, main


def test_the_help_of_a_class_is_plain_too(toy, capsys, monkeypatch):
    class Part:
        """A part, see `toy.ToyModule`.

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
