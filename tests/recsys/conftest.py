"""Rows that tests of several rooms share."""

import runpy
from pathlib import Path

import pytest
import torch

from recsys.inputs import Batch

TOY = runpy.run_path(str(Path(__file__).parents[1] / "fixtures" / "toy_ranker.py"))


@pytest.fixture
def rows_of():
    """Make a batch from its tensors; what is not given is constant."""

    def make(labels, *, sparse=None, dense=None, mask=None, weight=None, user=None):
        labels = torch.as_tensor(labels, dtype=torch.float32)
        count = len(labels)
        return Batch(
            torch.zeros(count, 0, dtype=torch.int64) if sparse is None else sparse,
            torch.zeros(count, 0) if dense is None else dense,
            (),
            labels,
            torch.ones_like(labels, dtype=torch.bool) if mask is None else mask,
            torch.ones(count) if weight is None else weight,
            torch.arange(count) if user is None else user,
        )

    return make
