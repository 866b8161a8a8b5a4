"""Both sides of the comparison with torch-rechub compute the same."""

import importlib

import pytest
import torch
from torch.testing import assert_close

from benchmarks.recsys import rechub

pytest.importorskip("torch_rechub")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    small = {"FIELDS": 5, "DIM": 2, "TASKS": 3, "EXPERTS": 4, "BATCH": 32, "EXPERT_DIMS": [6, 4]}
    for name, value in {**small, "TOWER_DIMS": [3]}.items():
        monkeypatch.setattr(rechub, name, value)


@pytest.mark.parametrize("name", ["MMoE", "PLE"])
def test_losses_of_several_steps_agree(name):
    calls = rechub.training_step(name).build(importlib.import_module)
    losses = {side: torch.stack([call() for _ in range(5)]) for side, call in calls.items()}
    theirs = losses.pop("torch-rechub")
    assert set(losses) == {"ours", "ours, C++"}
    for ours in losses.values():
        assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert theirs.shape == (5, 3)
    assert theirs[-1].sum() < theirs[0].sum()
