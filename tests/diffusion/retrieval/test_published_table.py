"""The table of adapters, images and captions."""

import pytest
import torch

from diffusion.data.published_table import split_table
from diffusion.lora_file import LoraFileError, save_lora
from diffusion.retrieval import Example
from diffusion.retrieval.retriever_data import Captions

HEADER = "model_file,image_file,text,text_short,text_medium"


@pytest.fixture
def folder(tmp_path, adapter):
    for number, name in enumerate(("a", "b")):
        save_lora(adapter(number), tmp_path / f"{name}.safetensors", "diffusers")
    return tmp_path


def write(folder, text):
    path = folder / "table.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_rows_are_grouped_by_adapter(folder):
    rows = [
        f"{HEADER},description_en,concept",
        'a.safetensors,1.png,"a long, red cat",cat,red cat,,cats',
        "b.safetensors,2.png,a dog on grass,dog,,Crayon drawings.,",
        "a.safetensors,3.png,,kitten,,,",
    ]
    (first, second), _ = split_table(write(folder, "\n".join(rows)), 0.0)
    assert (first.concept, second.concept) == ("cats", "b.safetensors")
    assert len(first.bundle.modules) == 26
    weights = dict(zip(first.captions, first.weights, strict=True))
    third = pytest.approx(1 / 6)
    assert weights == {"a long, red cat": third, "cat": third, "red cat": third, "kitten": 0.5}
    weights = dict(zip(second.captions, second.weights, strict=True))
    assert weights == {"Crayon drawings. dog": 0.5, "a dog on grass": 0.25, "dog": 0.25}


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("model_file,text\na.safetensors,x", "lacks the columns image_file"),
        (HEADER, "no rows"),
        pytest.param(
            f"{HEADER}\na.safetensors,1.png,x,y,x,z",
            "cannot be read: line 2: it has 6 cells, expected 5",
            marks=pytest.mark.fault("46 neighbors"),
        ),
        ("", "lacks the columns"),
        (f"{HEADER}\n,1.png,x,x,x", "line 2"),
        (f"{HEADER}\na.safetensors,1.png,,,", "no caption"),
        (f"{HEADER}\n../a.safetensors,1.png,x,x,x", "outside"),
        (f"{HEADER}\n/etc/passwd,1.png,x,x,x", "outside"),
        (f"{HEADER}\nnothing.safetensors,1.png,x,x,x", "cannot be opened"),
        (f"{HEADER}\na\0.safetensors,1.png,x,x,x", "read|name of a file"),
        (HEADER.encode() + b"\n\xff,1,2,3,4", "cannot be read"),
    ],
)
def test_tables_that_are_refused(folder, text, word, one_line):
    import re

    assert re.search(word, one_line(LoraFileError, split_table, write(folder, text), 0.0))


def test_a_table_that_is_not_there(tmp_path, one_line):
    assert "No such file" in one_line(LoraFileError, split_table, tmp_path / "none.csv", 0.0)


def test_each_caption_is_embedded_once_and_drawn_by_its_weight(adapter, words):
    bundle = adapter(0)
    examples = [
        Example(bundle, ["x 1", "x 2", "y 1"], "x", [3.0, 1.0, 0.0]),
        Example(bundle, ["y 1", "x 1"], "y"),
    ]
    captions = Captions(examples, words)
    assert (words.calls, captions.embeddings.shape) == (["x 1", "x 2", "y 1"], (3, 24))
    torch.manual_seed(0)
    drawn = captions.draw(torch.tensor([0, 1]).repeat(2000))
    counts = [[torch.isclose(drawn[k::2], row).all(1).sum().item() for row in captions.embeddings]
              for k in range(2)]  # fmt: skip
    assert (counts[0][2], counts[0][0]) == (0, pytest.approx(1500, abs=60))
    assert counts[1] == [pytest.approx(1000, abs=70), 0, pytest.approx(1000, abs=70)]
    text, owners = captions.all()
    assert owners.tolist() == [0, 0, 1, 1]
    assert torch.equal(text[2], captions.embeddings[2])


def test_captions_that_are_refused(adapter, words, one_line):
    nothing = [Example(adapter(0), ["  "], "x")]
    assert "has no caption" in one_line(LoraFileError, Captions, nothing, words)

    class Long:
        fingerprint = "long"

        def embed(self, texts):
            return torch.ones(len(texts), 24)

    assert "unit length" in one_line(
        LoraFileError, Captions, [Example(adapter(0), ["a"], "x")], Long()
    )


def test_a_row_that_is_there_twice_is_in_one_part(folder):
    rows = [f"a.safetensors,{n}.png,caption {n},," for n in range(5)]
    path = write(folder, "\n".join([HEADER, *rows, *rows, "b.safetensors,9.png,x,,"]))
    training, validation = split_table(path, 0.4)
    seen, held = (
        {text for one in part for text in one.captions} for part in (training, validation)
    )
    assert (len(seen), len(held)) == (4, 2)
    assert not seen & held
