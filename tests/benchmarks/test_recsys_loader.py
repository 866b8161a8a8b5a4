import importlib

import pytest

from benchmarks.recsys import loader


@pytest.fixture
def calls(monkeypatch):
    """Every variant of every comparison, on few rows."""
    monkeypatch.setattr(loader, "ROWS", {"ours": 600, "torch-rechub": 600})
    monkeypatch.setattr(loader, "BULK", 1000)
    monkeypatch.setattr(loader, "BATCH", 100)
    return {c.op: c.build(importlib.import_module) for c in loader.comparisons()}


def test_both_loaders_make_as_many_batches(calls):
    assert {call() for call in calls["recsys_loader"].values()} == {6}


def test_candidates_are_encoded_like_many_rows(calls):
    many, few = (call() for call in calls["recsys_encode"].values())
    assert (many.sparse[: loader.CANDIDATES] == few.sparse).all()
    assert many.sparse.shape == (1000, 7)
