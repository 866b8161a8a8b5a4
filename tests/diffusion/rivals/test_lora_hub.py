"""LoraHub: a search without gradients that finds the factors, within its budget."""

import pytest
import torch
from torch.testing import assert_close

from core_gates.errors import GatesError
from diffusion.rivals.weighing import LoraHub


def test_factors_are_found(flux, inputs, bundle, dense):
    adapters = {"a": bundle(1), "b": bundle(2)}
    target = dense(adapters, {"a": 0.7, "b": -0.4})
    calls = []

    def loss():
        calls.append(1)
        return float((flux(**inputs)[0] - target).square().mean())

    with LoraHub(flux, adapters, regularization=0.0) as rival:
        start = loss()
        found = rival.search(loss, budget=60)
        best = loss()
        rival.set_strengths({"a": 0.5})
        half = flux(**inputs)[0]
    assert len(calls) <= 62
    assert best < 0.02 * start
    assert found == pytest.approx({"a": 0.7, "b": -0.4}, abs=0.1)
    assert_close(half, dense(adapters, {"a": 0.5 * found["a"], "b": found["b"]}))
    assert_close(dense({"one": rival.bundle}), half)


def test_the_best_that_was_tried_stays(flux, bundle):
    losses = iter([3.0, 1.0, 2.0, 5.0])
    with LoraHub(flux, {"a": bundle(1), "b": bundle(2)}, regularization=0) as rival:
        tried = []

        def loss():
            tried.append(dict(rival.learned))
            return next(losses)

        assert rival.search(loss, budget=4) == tried[1] == rival.learned
        assert tried[0] == {"a": 0.0, "b": 0.0}
        assert all(abs(value) <= 1.5 for one in tried for value in one.values())


def test_a_budget_of_one_is_the_start(flux, bundle):
    with LoraHub(flux, {"a": bundle(1), "b": bundle(2)}) as rival:
        calls = []
        assert rival.search(lambda: calls.append(1) or 1.0, budget=1) == {"a": 0.0, "b": 0.0}
        assert calls == [1]


def test_regularization_draws_towards_zero(flux, bundle):
    with LoraHub(flux, {"a": bundle(1)}, regularization=0.5) as rival:
        assert rival.search(lambda: 1.0, budget=30) == pytest.approx({"a": 0.0}, abs=1e-3)


def test_failures_leave_the_factors_as_they_were(flux, inputs, bundle):
    rival = LoraHub(flux, {"a": bundle(1)})
    with pytest.raises(GatesError, match="adapters are not attached: attach them"):
        rival.search(lambda: 1.0)
    with rival:
        before = flux(**inputs)[0]
        with pytest.raises(GatesError, match=r"the loss is nan at \{'a': 0.0\}: it must be finite"):
            rival.search(lambda: float("nan"))
        with pytest.raises(GatesError, match="the budget is 0"):
            rival.search(lambda: 1.0, budget=0)
        assert torch.equal(flux(**inputs)[0], before)
        rival.search(lambda: 1.0, budget=3)
        rival.set_adapters({"x": bundle(4)})
        assert rival.learned == {"x": 1.0}
