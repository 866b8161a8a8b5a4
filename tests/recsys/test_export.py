"""Exported rankers: parity at any batch, what is missing, what is damaged."""

import importlib.util
import logging
import shutil

import pytest
import torch
from torch.testing import assert_close

from core_gates import GatesError, MissingExtraError
from recsys import HoME, export
from recsys.export import (
    BATCHES,
    check_parity,
    export_forms,
    export_ranker,
    largest_gaps,
    load_exported,
    random_rows,
)
from recsys.models import MODELS, options_of
from recsys.ranker import Ranker
from recsys.schema import Crossed, Dense, FeatureSchema, History, Sparse, Task, Threshold

from .conftest import TOY

HAS_COMPILER = any(map(shutil.which, export.COMPILERS))
HAS_ONNX = all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime")))


def check(ranker, path, form, *, int8=False):
    """Export, load and compare, also with rows of other seeds and with an unfolded ranker."""
    compare(ranker, export_ranker(ranker, path, form, int8=int8), int8=int8)


def compare(ranker, made, *, int8=False):
    assert made.path.is_file()
    assert list(made.gaps) == list(BATCHES) == [1, 37, 500]
    score = load_exported(made.path)
    expected = ranker.folded(int8=True) if int8 else ranker
    for number in (1, 5, 37, 500):
        rows = random_rows(ranker, number, seed=100 + number)
        with torch.no_grad():
            found, wanted = score(*rows), expected(*rows)
        assert found.shape == (number, len(ranker.schema.tasks))
        assert_close(found, wanted, rtol=0, atol=1e-5)
    assert wanted.std() > 0.01


def home():
    """HoME with every encoder."""
    made = TOY["toy_ranker"]("target_attention", "transformer", net=_home)
    made.train()(*TOY["rows"](64))  # running statistics
    return made.eval()


def _home(input_dim, tasks):
    return HoME(input_dim, tasks, dim=4, hidden_dims=(6,), rank=2, tower_dims=(3,))


def only_with(tool):
    return pytest.mark.skipif(not tool, reason="a package or a compiler is missing")


ONNX = pytest.param("onnx", marks=only_with(HAS_ONNX))
AOTI = pytest.param("aoti", marks=[only_with(HAS_COMPILER), pytest.mark.slow])


@pytest.fixture(scope="module")
def small():
    """Most parts of a ranker once: attention, a cross, buckets, normalization, gates, numbers."""
    numbers = Task("n", kind="regression", scale="x"), Task("m", kind="regression")
    reached = Threshold("n", factor=1.0, most=3.0), Threshold("m", most=2.0, below=True)
    labels = Task("c", threshold=reached[0]), Task("d", threshold=reached[1])
    schema = FeatureSchema(
        tasks=(Task("a"), Task("b"), *numbers, *labels),
        sparse=(Sparse("user"), Sparse("item")),
        dense=(Dense("x"), Dense("age", scaling="buckets", buckets=4)),
        sequences=(History("last", of="item", max_length=4, encoder="target_attention"),),
        crossed=(Crossed(("user", "item"), buckets=9),),
        dim=4,
    )
    sizes = {"user": 5, "item": 7, "user x item": 9, "age": 6}
    options = {"hidden_dims": [4], "tower_dims": [2], "norm": "batch"}
    torch.manual_seed(0)
    ranker = Ranker.build(schema, sizes, 2, "MMoE", options)
    for table in ranker.tables():
        table.data.normal_()
    for seed in range(3):
        ranker.train()(*random_rows(ranker, 64, seed=seed))
    return ranker.eval()


@pytest.fixture(scope="module")
def exported(small, tmp_path_factory):
    """A file of each form for which the packages are here, traced once."""
    folder = tmp_path_factory.mktemp("exported")
    forms = ["torch", "onnx"] if HAS_ONNX else ["torch"]
    paths = {form: folder / f"ranker{export.SUFFIXES[form]}" for form in forms}
    return {made.form: made for made in export_forms(small, paths, int8=True)}


@pytest.mark.parametrize("form", ["torch", ONNX])
def test_every_form_gives_the_same(form, small, exported):
    compare(small, exported[form], int8=True)


@pytest.mark.slow
def test_tables_of_numbers_give_the_same(small, tmp_path):
    check(small, tmp_path / "ranker.pt2", "torch")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["torch", ONNX, AOTI])
def test_every_form_of_home_gives_the_same(form, tmp_path):
    check(home(), tmp_path / f"ranker{export.SUFFIXES[form]}", form, int8=form == "torch")


@pytest.mark.parametrize("form", [AOTI])
def test_every_kind_of_feature_gives_the_same(form, tmp_path):
    check(TOY["toy_ranker"](copies=2), tmp_path / "ranker.aoti.pt2", form)


@pytest.mark.parametrize("form", [AOTI])
@pytest.mark.parametrize("int8", [False, True])
def test_a_home_of_14_tasks_gives_the_same(form, int8, tmp_path, caplog):
    """The network of the configuration tiny, whose rows of gates fill vectors of the processor."""
    tasks = tuple(Task(f"t{i}", category=("watch", "act")[i % 2]) for i in range(14))
    schema = FeatureSchema(
        tasks=tasks, sparse=(Sparse("user"), Sparse("item")), dense=(Dense("x"),), dim=8
    )
    options = {"dim": 16, "hidden_dims": [32], "rank": [4, 4], "tower_dims": [16]}
    ranker = Ranker.build(schema, {"user": 50, "item": 70}, 2, "HoME", options)
    for seed in range(3):
        ranker.train()(*random_rows(ranker, 64, seed=seed))
    check(ranker.eval(), tmp_path / "ranker.aoti.pt2", form, int8=int8)
    said = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert not said  # such as that Inductor cannot compile a lookup


COMPILER_SAYS = """CppCompileError: C++ compile error

Command:
g++ kernel.cpp -O3

Output:
kernel.cpp: In function 'void kernel()':
kernel.cpp:412:47: error: operands to '?:' have different types
kernel.cpp:419:62: error: expected primary-expression
"""


def test_a_compiler_that_fails_is_one_line_and_replaces_no_file(tmp_path, monkeypatch):
    def fail(program, ranker, path):
        path.write_text("half")
        raise RuntimeError(COMPILER_SAYS)

    monkeypatch.setitem(export._WRITERS, "aoti", fail)
    monkeypatch.setattr(export, "_check_tools", lambda form: None)
    paths = {"torch": tmp_path / "model.pt2", "aoti": tmp_path / "model.aoti.pt2"}
    for path in paths.values():
        path.write_text("old")
    with pytest.raises(GatesError, match="ToyNet cannot be exported as aoti: operands to") as found:
        export_forms(TOY["toy_ranker"](), paths)
    assert "\n" not in str(found.value)
    assert str(found.value).endswith("export it as torch or onnx, and report this")
    assert [path.read_text() for path in paths.values()] == ["old", "old"]
    assert sorted(tmp_path.iterdir()) == sorted(paths.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*MODELS} - {"Linear"}))
def test_every_network_gives_the_same(name, tmp_path):
    """With batch normalization where there is any, folded and with statistics that matter."""
    options = {"dim": 4, "hidden_dims": [6], "tower_dims": [3]}
    norms = {"norm": "batch", "tower_norm": "batch"}
    options |= {o: v for o, v in norms.items() if o in options_of(name)}
    options = {"deep": "MMoE", "deep_options": options} if name == "WideAndDeep" else options
    sizes = (TOY["SIZES"], 4)
    ranker = Ranker.build(TOY["schema"]("target_attention"), *sizes, name, options)
    with torch.no_grad():
        for parameter in ranker.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    for seed in range(3):
        ranker.train()(*TOY["rows"](64, seed))
    check(ranker.eval(), tmp_path / "ranker.pt2", "torch")


class Fixed(TOY["ToyNet"]):
    """A network that works for the batch that it was traced with."""

    def forward(self, v, prior=None):
        return super().forward(v.view(len(v), -1))


def test_a_network_that_cannot_be_traced_is_named(tmp_path):
    with pytest.raises(GatesError, match="Fixed cannot be exported for any number of rows") as e:
        export_ranker(TOY["toy_ranker"](net=Fixed), tmp_path / "ranker.pt2")
    assert "\n" not in str(e.value)


def test_a_ranker_that_differs_is_refused():
    ranker, other = TOY["toy_ranker"](), TOY["toy_ranker"]()
    assert largest_gaps(ranker, other) == {1: 0.0, 37: 0.0, 500: 0.0}
    with torch.no_grad():
        other.net.out.bias[1] += 1e-3
    with pytest.raises(GatesError, match=r"exported as onnx is off by .* at a batch of 1 rows"):
        check_parity(ranker, other, "onnx")
    with torch.no_grad():
        other.net.out.bias[1] = torch.nan
    with pytest.raises(GatesError, match="off by nan"):
        check_parity(ranker, other, "onnx")


def test_random_rows_reach_everything():
    ranker = TOY["toy_ranker"]()
    rows = random_rows(ranker, 3000)
    sizes = [TOY["SIZES"][field.table] for field in ranker.banks[0].fields]
    assert rows.sparse.amax(0).tolist() == [size - 1 for size in sizes]
    lengths = (rows.sequences[0] != 1).sum(1)
    assert (int(lengths.min()), int(lengths.max())) == (0, 6)


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    ranker = TOY["toy_ranker"]()
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(GatesError, match=r"needs a C\+\+ compiler, and g\+\+ or clang\+\+ is not"):
        export_ranker(ranker, tmp_path / "r.aoti.pt2", "aoti")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    line = r"export needs onnx: pip install 'gatesuite\[export\]'"
    with pytest.raises(MissingExtraError, match=line):
        export_ranker(ranker, tmp_path / "r.onnx", "onnx")
    monkeypatch.setattr(export, "ONNX_BYTES", 100)
    with pytest.raises(GatesError, match=r"an ONNX file holds 2\.1: export with int8"):
        export._write_onnx(None, ranker, tmp_path / "r.onnx")


def test_a_wrong_name_or_form_is_refused(tmp_path, refuses):
    ranker = TOY["toy_ranker"]()
    with pytest.raises(GatesError, match=r"the file of form aoti must end in .aoti.pt2"):
        export_ranker(ranker, tmp_path / "r.pt2", "aoti")
    with pytest.raises(ValueError, match="form is 'tflite'"):
        export_ranker(ranker, tmp_path / "r.tflite", "tflite")
    refuses(
        GatesError,
        ("is no exported ranker", lambda: load_exported(tmp_path / "r.tflite")),
        ("does not exist", lambda: load_exported(tmp_path / "r.onnx")),
    )


@pytest.mark.parametrize("name", ["r.pt2", "r.aoti.pt2", "r.onnx"])
def test_a_damaged_file_is_refused_in_one_line(name, tmp_path):
    if name.endswith("onnx"):
        pytest.importorskip("onnxruntime")
    path = tmp_path / name
    path.write_bytes(b"PK damaged")
    with pytest.raises(GatesError, match=f"{name} cannot be loaded: .*; export it again") as caught:
        load_exported(path)
    assert "\n" not in str(caught.value)
