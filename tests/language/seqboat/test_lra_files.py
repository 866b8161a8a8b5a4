"""Files of the Long Range Arena, written by a script that imports nothing of this project."""

import subprocess
import sys

import numpy as np
import pytest

from core_gates.errors import GatesError
from language.seqboat.lra_files import LraData

SCRIPT = """
import csv, pathlib, random, sys

folder, draws = pathlib.Path(sys.argv[1]), random.Random(3)
lists = {"train": 6, "valid": 3, "test": 3}

def both(name, rows):
    for split, number in lists.items():
        (folder / name).mkdir(exist_ok=True)
        made = [rows(split, n) for n in range(number)]
        (folder / name / f"{split}.src").write_text("".join(f"{x}\\n" for x, _ in made))
        (folder / name / f"{split}.label").write_text("".join(f"{y}\\n" for _, y in made))

both("text", lambda split, n: (("good", "poor caf\\u00e9\\u2028.")[n % 2] * (n + 1), n % 2))
both("words", lambda split, n: (" ".join("cab"[: n % 3 + 1]), ("10", "9")[n % 2]))
both("image", lambda split, n: (" ".join(str(n * 40 + p) for p in range(4)), n % 3))
both("trees", lambda split, n: (f"( ( [MAX {n} ) [MIN 3 1 ] ) ]", max(n, 1)))
(folder / "tsv").mkdir()
for split, name in {"train": "train", "valid": "val", "test": "test"}.items():
    with open(folder / "tsv" / f"basic_{name}.tsv", "w", newline="") as file:
        writer = csv.writer(file, delimiter="\\t")
        writer.writerow(["Source", "Target"])
        for n in range(lists[split]):
            writer.writerow([f"( ( ( [SM {n} ) 9 ) ] )", (n + 9) % 10])
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of files of each kind; not to be changed."""
    folder = tmp_path_factory.mktemp("lra")
    subprocess.run([sys.executable, "-I", "-S", "-c", SCRIPT, folder], check=True)
    return folder


def parts(files, name, kind, **options):
    data = LraData(str(files / name), kind, batch_size=3, **options)
    data.setup("fit")
    assert [len(data.part(s).inputs) for s in ("train", "validation", "test")] == [6, 3, 3]
    return data, data.part("train")


def test_bytes_are_those_of_the_line(files):
    data, part = parts(files, "text", "bytes")
    assert (data.symbols, data.classes) == (257, ["0", "1"])
    assert bytes((part.inputs[0] - 1).tolist()) == b"good"
    assert bytes((part.inputs[1] - 1).tolist()).decode() == "poor café\u2028." * 2  # is one line
    assert part.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert next(iter(data.train_dataloader())).x.dtype.is_floating_point is False


def test_symbols_are_numbered_in_order(files):
    data, part = parts(files, "words", "symbols")
    assert (data.symbols, data.classes) == (4, ["9", "10"])
    assert [x.tolist() for x in part.inputs[:3]] == [[3], [3, 1], [3, 1, 2]]
    assert part.labels.tolist()[:2] == [1, 0]


def test_pixels_are_normalized(files):
    data, part = parts(files, "image", "pixels", mean=0.48, std=0.24)
    assert data.symbols == 0
    expected = ((np.arange(4) + 40) / 255 - 0.48) / 0.24
    np.testing.assert_allclose(part.inputs[1], expected, rtol=1e-5)
    assert next(iter(data.train_dataloader())).x.dtype.is_floating_point


@pytest.mark.parametrize(("name", "values"), [("trees", [1, 1, 2]), ("tsv", [9, 0, 1])])
def test_trees_are_read_from_both_forms(files, name, values):
    data, part = parts(files, name, "trees")
    assert (data.symbols, len(data.classes)) == (16, 10)
    assert part.labels.tolist()[:3] == values
    operator = {"trees": "[MAX", "tsv": "[SM"}[name]
    assert part.inputs[0][0] == ["[MAX", "[MIN", "[MED", "[SM"].index(operator) + 1
    assert min(x.min() for x in part.inputs) >= 1


def test_faulty_files_are_named_with_the_line(tmp_path, refuses):
    def reading(kind, source, label, split="train"):
        texts = {"train": ("1 2\n", "0\n"), "valid": ("1\n", "0\n"), "test": ("2\n", "0\n")}
        texts[split] = source, label

        def read():
            for name, (src, labels) in texts.items():
                (tmp_path / f"{name}.src").write_bytes(src.encode("latin1"))
                (tmp_path / f"{name}.label").write_text(labels)
            LraData(str(tmp_path), kind).read()

        return read

    refuses(
        GatesError,
        ("train.label has 1 lines, but train.src 2", reading("bytes", "a\nb\n", "0\n")),
        ("valid.label has 3 lines, but valid.src 1", reading("bytes", "a", "0\n1\n0", "valid")),
        ("train.src, line 2 has no sequence", reading("symbols", "1\n \n", "0\n0\n")),
        ("train.src, line 1 has no label", reading("symbols", "1\n2\n", "\n0\n")),
        ("test.src, line 1: no training .* the symbol '7'", reading("symbols", "7", "0", "test")),
        ("no training sequence has the label '3'", reading("bytes", "1", "3", "test")),
        ("line 1: '256' is no pixel, a number from 0", reading("pixels", "0 256", "0")),
        ("line 2: '-1' is no pixel", reading("pixels", "0\n-1", "0\n0")),
        ("line 1: '.5' is no pixel", reading("pixels", ".5", "0")),
        ("line 1: token 3 is '10', expected a digit", reading("trees", "[MAX 1 10 ]", "0")),
        ("line 1: 1 operators are not closed", reading("trees", "[MAX 1 2", "2")),
        ("line 1: byte 2 is not UTF-8", reading("bytes", "a\xe9", "0")),
        ("train.label cannot be read: No such", LraData(str(tmp_path / "a"), "bytes").read),
        ("the test part has no sequence", lambda: empty(tmp_path).setup("test")),
    )
    refuses(ValueError, ("kind", lambda: LraData("a", "words")))
    refuses(ValueError, ("std must be positive", lambda: LraData("a", "pixels", std=0)))


def empty(folder):
    for name in ("train", "valid", "test"):
        for suffix in ("src", "label"):
            (folder / f"{name}.{suffix}").write_text("" if name == "test" else "1\n2\n")
    return LraData(str(folder), "bytes")
