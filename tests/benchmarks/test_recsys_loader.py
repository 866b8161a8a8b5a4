import importlib

import pytest

from benchmarks.recsys import loading


@pytest.fixture
def calls(monkeypatch):
    """Every variant of every comparison, on few rows."""
    monkeypatch.setattr(loading, "ROWS", {"ours": 600, "torch-rechub": 600})
    monkeypatch.setattr(loading, "BULK", 1000)
    monkeypatch.setattr(loading, "BATCH", 100)
    return {c.op: c.build(importlib.import_module) for c in loading.comparisons()}


def test_candidates_are_encoded_like_many_rows(calls):
    many, few = (call() for call in calls["recsys_encode"].values())
    assert (many.sparse[: loading.CANDIDATES] == few.sparse).all()
    assert many.sparse.shape == (1000, 7)
