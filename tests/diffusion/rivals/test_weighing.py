"""Rivals that weigh adapters by numbers: fixed, tuned, searched."""

import pytest
import torch
from torch.testing import assert_close

from core_gates.errors import GatesError
from diffusion.rivals.weighing import AdapterStrengths, Composite, LoraHub, Mean, Sum, Switch


def first(adapters, count):
    return dict(list(adapters.items())[:count])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_sum_mean_and_tuned_strengths(flux, inputs, adapters, dense, count):
    given = first(adapters, count)
    cases = (
        (Sum, {}, dict.fromkeys(given, 1.0)),
        (Mean, {}, dict.fromkeys(given, 1 / count)),
    )
    for kind, settings, weights in cases:
        with kind(flux, given, **settings) as rival:
            found = flux(**inputs)[0]
            rival.at(3, 28)
            assert torch.equal(flux(**inputs)[0], found)
            rival.set_strengths({"a": 0.5})
            weaker = flux(**inputs)[0]
            made = rival.bundle
        assert_close(found, dense(given, weights))
        assert_close(weaker, dense(given, weights | {"a": 0.5 * weights["a"]}))
        assert_close(dense({"made": made}), weaker)


def test_an_adapter_that_is_off_does_not_count(flux, inputs, adapters, dense):
    with Mean(flux, adapters) as rival:
        rival.set_strengths({"b": 0})
        assert_close(flux(**inputs)[0], dense(adapters, {"a": 0.5, "c": 0.5}))
    with Composite(flux, adapters) as rival:
        rival.set_strengths({"b": 0})
        found = flux(**inputs)[0]
        rival.set_strengths(dict.fromkeys(adapters, 0))
        nothing = flux(**inputs)[0]
    assert_close(found, sum([dense({name: adapters[name]}) for name in ("a", "c")]) / 2)
    assert torch.equal(nothing, flux(**inputs)[0])
    with Switch(flux, adapters, tau=1) as rival:
        rival.set_strengths({"a": 0})
        rival.at(1, 4)
        assert_close(flux(**inputs)[0], dense({"c": adapters["c"]}))
        rival.set_strengths({"b": 0, "c": 0})
        assert_close(flux(**inputs)[0], nothing)


def test_exchanged_adapters_are_weighed_at_once(flux, inputs, adapters, bundle, dense):
    with Mean(flux, adapters) as rival:
        rival.set_strengths({"a": 0.1})
        two = {"d": bundle(8), "e": bundle(9, rank=1)}
        rival.set_adapters(two)
        assert_close(flux(**inputs)[0], dense(two, {"d": 0.5, "e": 0.5}))
        assert rival.strengths == {"d": 1.0, "e": 1.0}


FACTORS = [[0.5, 0.2, 9.0, -0.8], [2.0, 0.1, -0.5, 0.3]]  # of any, a, b, c; of up to two, of more


@pytest.mark.fault("47 fusion rivals")
def test_strengths_by_adapter_are_the_same_in_all_layers(flux, inputs, adapters, dense):
    two = {name: adapters[name] for name in ("c", "a")}
    rival = AdapterStrengths(flux, two, names="abc").double()
    with rival:
        assert_close(flux(**inputs)[0], dense(two))  # ones at the start
        with torch.no_grad():
            rival.shared.factors.copy_(torch.tensor(FACTORS))
        rival.set_strengths({"c": 0.5})
        assert_close(flux(**inputs)[0], dense(two, {"c": 0.5 * -0.3, "a": 0.7}))
    rival.set_adapters(adapters)  # three have other strengths
    with rival, torch.no_grad():
        assert_close(flux(**inputs)[0], dense(adapters, {"a": 2.1, "b": 1.5, "c": 2.3}))


@pytest.mark.fault("47 fusion rivals")
def test_strengths_by_adapter_are_trained_by_the_adapters_in_force(flux, inputs, adapters, dense):
    two = {name: adapters[name] for name in ("c", "a")}
    with AdapterStrengths(flux, two, names="abc").double() as rival:
        assert [tuple(p.shape) for p in rival.parameters()] == [(2, 4)]
        flux(**inputs)[0].square().sum().backward()
    slopes = {}
    for name in two:
        above, below = (
            dense(two, {"a": 1.0, "c": 1.0, name: strength}).square().sum().item()
            for strength in (1 + 1e-4, 1 - 1e-4)
        )
        slopes[name] = (above - below) / 2e-4
    expected = [[slopes["a"] + slopes["c"], slopes["a"], 0.0, slopes["c"]], [0.0] * 4]
    found = rival.shared.factors.grad
    assert_close(found, torch.tensor(expected, dtype=found.dtype), rtol=1e-3, atol=1e-8)


def test_an_adapter_without_a_strength_is_refused_and_the_others_stay(flux, adapters, bundle):
    rival = AdapterStrengths(flux, first(adapters, 2))
    with pytest.raises(GatesError, match="adapter is 'z'; choose one of a, b"):
        rival.set_adapters({"z": bundle(7)})
    assert list(rival.adapters) == ["a", "b"]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_switch_takes_each_adapter_for_some_steps(flux, inputs, adapters, dense, count):
    given = first(adapters, count)
    alone = [dense({name: adapter}, {name: 0.8}) for name, adapter in given.items()]
    with Switch(flux, given) as rival:
        rival.set_strengths(dict.fromkeys(given, 0.8))
        assert_close(flux(**inputs)[0], alone[0])
        for step in range(0, 28, 3):
            rival.at(step, 28)
            assert_close(flux(**inputs)[0], alone[step // 5 % count])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_composite_averages_predictions_and_guided_ones(flux, inputs, adapters, dense, count):
    given = first(adapters, count)
    other = inputs | {"encoder_hidden_states": -inputs["encoder_hidden_states"]}
    with Composite(flux, given) as rival:
        rival.set_strengths({"a": 0.6})
        with torch.no_grad():
            found, negative = flux(**inputs)[0], flux(**other)[0]
            named = flux(**inputs | {"return_dict": True})
    weights = {"a": 0.6, "b": 1.0, "c": 1.0}
    pairs = [
        [dense({name: one}, weights, given=i) for i in (inputs, other)]
        for name, one in given.items()
    ]
    assert_close(found, sum(c for c, _ in pairs) / count)
    guided = sum(u + 4.0 * (c - u) for c, u in pairs) / count
    assert_close(negative + 4.0 * (found - negative), guided)
    assert_close(named.sample, found)
    if count > 1:
        assert not torch.allclose(found, dense(given, {n: w / count for n, w in weights.items()}))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m, a: Switch(m, a, tau=0), "tau is 0, expected at least one step"),
        (lambda m, a: Sum(m, a).set_strengths({"z": 1}), "no adapter is named 'z'"),
    ],
)
def test_refusals(flux, adapters, make, message):
    with pytest.raises(GatesError, match=message):
        make(flux, adapters)


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


def test_failures_leave_the_factors_as_they_were(flux, inputs, bundle, refuses):
    rival = LoraHub(flux, {"a": bundle(1)})
    with pytest.raises(GatesError, match="adapters are not attached: attach them"):
        rival.search(lambda: 1.0)
    with rival:
        before = flux(**inputs)[0]
        refuses(
            GatesError,
            (
                r"the loss is nan at \{'a': 0.0\}: it must be finite",
                lambda: rival.search(lambda: float("nan")),
            ),
            ("the budget is 0", lambda: rival.search(lambda: 1.0, budget=0)),
        )
        assert torch.equal(flux(**inputs)[0], before)
        rival.search(lambda: 1.0, budget=3)
        rival.set_adapters({"x": bundle(4)})
        assert rival.learned == {"x": 1.0}
