"""The adapter of TorchRec: the check of versions, and, where it is installed, equality."""

import importlib.metadata
import runpy
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from core_gates.errors import MissingExtraError
from recsys.embedding import torchrec
from recsys.embedding.row_wise_adagrad import RowWiseAdagrad

TOY = runpy.run_path(str(Path(__file__).parents[2] / "fixtures" / "toy_ranker.py"))


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        ({}, "torchrec is not installed"),
        ({"torchrec": "1.9.2"}, "fbgemm-gpu is not installed"),
        ({"torchrec": "1.8.0", "fbgemm-gpu-cpu": "1.8.0"}, "found torchrec 1.8.0"),
        ({"torchrec": "1.9.2", "fbgemm-gpu": "1.9.0"}, "found fbgemm-gpu 1.9.0"),
    ],
)
def test_missing_and_other_versions_are_named_in_one_line(monkeypatch, installed, message):
    def version(name):
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    ranker = TOY["toy_ranker"]()
    before = dict(ranker.banks[0].stacks)
    with pytest.raises(MissingExtraError, match=message) as caught:
        torchrec.use_torchrec(ranker)
    assert str(caught.value).startswith("TorchRec tables need torchrec 1.9.2 and fbgemm-gpu 1.8.0")
    assert "pip install --no-deps torchrec==1.9.2" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert dict(ranker.banks[0].stacks) == before


@pytest.mark.parametrize("name", ["fbgemm-gpu", "fbgemm-gpu-cpu"])
def test_the_known_pair_is_accepted(monkeypatch, name):
    installed = {"torchrec": "1.9.2", name: "1.8.0+cpu"}
    monkeypatch.setattr(torchrec, "_version", lambda name: installed.get(name, ""))
    torchrec.check_versions()


@pytest.mark.filterwarnings("ignore")
def test_its_tables_train_as_ours():
    pytest.importorskip("torchrec")
    rows, trained = TOY["rows"](20), []
    for use in (lambda _: None, torchrec.use_torchrec):
        ranker = TOY["toy_ranker"]("target_attention")
        use(ranker)
        optimizer = RowWiseAdagrad(ranker.tables(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            ranker(*rows).square().sum().backward()
            assert all(table.grad.is_sparse for table in ranker.tables())
            optimizer.step()
        trained.append(ranker)
    ours, theirs = trained
    assert isinstance(theirs.banks[0].stacks["4"], torchrec.TorchRecTables)
    assert_close(theirs(*rows), ours(*rows), rtol=1e-5, atol=1e-5)
    for name, table in ours.banks[0].named_tables().items():
        assert_close(theirs.banks[0].named_tables()[name], table, rtol=1e-5, atol=1e-5)
    assert torch.is_grad_enabled()
