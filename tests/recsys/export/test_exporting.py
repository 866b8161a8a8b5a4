"""Exported rankers: parity at any batch, what is missing, what is damaged."""

import importlib
import importlib.util
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from core_gates.errors import GatesError, MissingExtraError
from recsys.export import exporting
from recsys.export.exporting import export_ranker
from recsys.export.loading import load_exported
from recsys.export.parity import BATCHES, check_parity, largest_gaps, random_rows
from recsys.models import MODELS, options_of
from recsys.ranker import Ranker

TOY = runpy.run_path(str(Path(__file__).parents[2] / "fixtures" / "toy_ranker.py"))
HAS_COMPILER = any(map(shutil.which, exporting.COMPILERS))


def check(ranker, path, form, *, int8=False):
    """Export, load and compare, also with rows of other seeds and with an unfolded ranker."""
    made = export_ranker(ranker, path, form, int8=int8)
    assert made.path.is_file()
    assert list(made.gaps) == list(BATCHES) == [1, 37, 500]
    score = load_exported(path)
    expected = ranker.folded(int8=True) if int8 else ranker
    for number in (1, 5, 37, 500):
        rows = random_rows(ranker, number, seed=100 + number)
        with torch.no_grad():
            found, wanted = score(*rows), expected(*rows)
        assert found.shape == (number, len(ranker.schema.tasks))
        assert_close(found, wanted, rtol=0, atol=1e-5)
    assert wanted.std() > 0.01
    return score


def home():
    """HoME with every encoder; the toy network where HoME does not exist."""
    if importlib.util.find_spec("recsys.models.home") is None:
        return TOY["toy_ranker"]("target_attention", "transformer")
    made = TOY["toy_ranker"]("target_attention", "transformer", net=_home)
    made.train()(*TOY["rows"](64))  # running statistics
    return made.eval()


def _home(input_dim, tasks):
    module = importlib.import_module("recsys.models.home")
    return module.HoME(input_dim, tasks, dim=4, hidden_dims=(6,), rank=2, tower_dims=(3,))


def test_torch_export_gives_the_same(tmp_path):
    check(home(), tmp_path / "ranker.pt2", "torch", int8=True)


def test_onnx_gives_the_same(tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    check(home(), tmp_path / "ranker.onnx", "onnx")


@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")
def test_aoti_gives_the_same(tmp_path):
    check(TOY["toy_ranker"](copies=2), tmp_path / "ranker.aoti.pt2", "aoti")


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")
def test_aoti_of_home_gives_the_same(tmp_path):
    check(home(), tmp_path / "ranker.aoti.pt2", "aoti")


NEEDED = {
    "ESMM": {"conditions": {"share": "click"}},
    "PEPNet": {"prior_dim": 2, "gate_dim": 4},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_network_gives_the_same(name, tmp_path):
    """With batch normalization where there is any, folded and with statistics that matter."""
    options = {"dim": 4, "hidden_dims": [6], "tower_dims": [3]}
    norms = {"norm": "batch", "tower_norm": "batch"}
    options |= {o: v for o, v in norms.items() if o in options_of(name)} | NEEDED.get(name, {})
    prior = ["tab"] if name == "PEPNet" else []
    sizes = (TOY["SIZES"], 4)
    ranker = Ranker.build(TOY["schema"]("target_attention"), *sizes, name, options, prior=prior)
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


def test_a_failed_export_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "ranker.pt2"
    path.write_text("old")
    monkeypatch.setattr(exporting, "check_parity", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_ranker(TOY["toy_ranker"](), path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


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
    with pytest.raises(MissingExtraError, match=r"export needs onnx: pip install '.\[export\]'"):
        export_ranker(ranker, tmp_path / "r.onnx", "onnx")
    monkeypatch.setattr(exporting, "ONNX_BYTES", 100)
    with pytest.raises(GatesError, match=r"an ONNX file holds 2\.1: export with int8"):
        exporting._write_onnx(None, ranker, tmp_path / "r.onnx")


def test_a_wrong_name_or_form_is_refused(tmp_path):
    ranker = TOY["toy_ranker"]()
    with pytest.raises(GatesError, match=r"the file of form aoti must end in .aoti.pt2"):
        export_ranker(ranker, tmp_path / "r.pt2", "aoti")
    with pytest.raises(ValueError, match="form is 'tflite'"):
        export_ranker(ranker, tmp_path / "r.tflite", "tflite")
    with pytest.raises(GatesError, match="is no exported ranker"):
        load_exported(tmp_path / "r.tflite")
    with pytest.raises(GatesError, match="does not exist"):
        load_exported(tmp_path / "r.onnx")


@pytest.mark.parametrize("name", ["r.pt2", "r.aoti.pt2", "r.onnx"])
def test_a_damaged_file_is_refused_in_one_line(name, tmp_path):
    if name.endswith("onnx"):
        pytest.importorskip("onnxruntime")
    path = tmp_path / name
    path.write_bytes(b"PK damaged")
    with pytest.raises(GatesError, match=f"{name} cannot be loaded: .*; export it again") as caught:
        load_exported(path)
    assert "\n" not in str(caught.value)
