"""Signs, intervals and words of the verdicts, on losses of known answer."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from apps.diffusion.studies.base_study import Method
from apps.diffusion.studies.fused_views import BOTH, RETENTION, retained_of
from apps.diffusion.studies.fusion_study import (
    BLIND,
    FEWER,
    FIRST_TRIALS,
    GROUPS,
    LAYERWISE,
    LIKE_GATES,
    LOWEST,
    METRIC,
    OPENING,
    SPACES,
    TRIALS,
    USELESS,
    VARIANTS,
    Fused,
    bars_of,
    bars_of_images,
    best_rival,
    best_score,
    compared,
    costs_of_useless,
    headline_of,
    suiting,
)
from diffusion.experiments.combined_losses import FIRST, MANY, OTHERS, TIMES, Bench, fusion_of
from diffusion.experiments.trained_gates import combinations, is_gated
from diffusion.lora_file import Factors, LoraBundle
from harness.evidence import Row
from harness.experiment.tuning import Choice
from harness.files.piece import Piece


def losses(factor, spread=0.02, pairs=48):
    random = np.random.default_rng(0)
    noise = np.random.default_rng(int(1000 * factor)).normal(0, spread, pairs)
    return factor * random.uniform(0.5, 2, pairs) * np.exp(noise)


@pytest.fixture
def rows():
    found = {
        "none": [losses(3.0)],
        "sum": [losses(1.0)],
        "mean": [losses(0.95)],
        "ties tuned": [losses(0.9)],
        "gates": [losses(0.801), losses(0.8), losses(0.799)],
    }

    def first(count):
        return {name: [one[:count] for one in own] for name, own in found.items()}

    return [
        row
        for group, task in GROUPS.items()
        for row in compared(first(len(combinations(group))), group, task)
    ]


def test_ratios_are_logarithms_over_the_base(rows):
    value = next(r.value for r in rows if (r.method, r.task, r.versus) == (
        "gates", GROUPS["test2"], ""))  # fmt: skip
    assert value == pytest.approx(math.log(0.8 / 3), abs=0.01)
    difference = next(r for r in rows if (r.method, r.versus) == ("sum", "gates"))
    assert difference.value == pytest.approx(math.log(1 / 0.8), abs=0.01)
    assert difference.n == 16  # subjects: pairs of one have its adapter and drawings in common


def test_bars_are_upper_ends_of_gates_over_rivals(rows):
    bars = {bar.name: bar for bar in bars_of(rows, "ties tuned")}
    tied = bars["48 unseen pairs: gates / ties tuned, upper end"]
    assert math.log(0.8 / 0.9) < tied.value < math.log(0.8 / 0.9) + 0.02
    assert tied.met
    assert tied.bar == 0
    strengths = bars["48 unseen triples: gates / layer_strengths, upper end"]
    assert strengths.bar == math.log(0.98)
    assert math.isnan(strengths.value)
    assert not strengths.met


def test_bars_of_images_and_of_a_switch_have_the_sign_of_their_names():
    def row(method, task, metric, value, low=0.0, high=0.0, versus=""):
        return Row(method, task, metric, value, low, high, versus=versus)

    images, useless = f"images of {GROUPS['test2']}", GROUPS["useless3"]
    rows = [
        row("sum", images, BOTH, -0.05, -0.08, -0.02, "gates"),
        row("gates", RETENTION, retained_of("style"), 0.4),
        row("gates + switch", useless, USELESS, 0.05),
        row("gates + switch", GROUPS["test2"], METRIC, 0.02, versus="gates"),
        row("gates + switch", useless, OPENING, 0.3),
    ]
    bars = [*bars_of(rows, "ties tuned"), *bars_of_images(rows)]
    found = {bar.name: (bar.value, bar.met) for bar in bars}
    assert found["images: gates - sum, both right, lower end"] == (0.02, True)
    assert found["style kept by gates"] == (0.4, False)
    assert found["a useless adapter: gates + switch"] == (0.05, True)
    assert found["a switch where none is useless: over gates"] == (0.02, False)
    assert found["switch, needed - useless"] == (0.3, True)


@pytest.mark.parametrize(
    ("factor", "words"),
    [(0.8, "loss of gates is 11.* lower"), (1.0, "loss of gates is 11.* higher"),
     (0.9, "gates are level")],
)  # fmt: skip
def test_the_headline_says_who_is_ahead(factor, words):
    found = {
        "none": [losses(3.0)],
        "ties tuned": [losses(0.9)],
        "gates": [losses(factor), losses(factor * 1.0001)],
    }
    rows = compared(found, "test2", GROUPS["test2"])
    assert __import__("re").search(words, headline_of(rows, "ties tuned"))


def test_the_best_trial_is_the_lowest_that_has_a_score():
    trials = [{"score": math.nan}, {"score": 0.3}, {"score": -0.2}]
    assert (best_score(Choice({}, trials, [])), best_score(Choice({}, [], []))) == (-0.2, math.inf)


def choice(score):
    return Choice({}, [{"score": score}, {"score": 1.0}], [])


def test_the_best_rival_is_chosen_by_trials():
    chosen = {
        "sum": choice(-0.2),
        "ties": choice(0.3),
        "gates": choice(-0.9),
        LAYERWISE: choice(-2),
    }
    assert best_rival(chosen) == "sum tuned"  # what is trained is no rival that is tuned
    assert best_rival({}) == ""


def test_schedules_are_tuned_at_the_times_of_the_test():
    asked = {}
    fused_by(asked).chosen()
    times = {name: own.get("times") for name, (own, *_) in asked.items()}
    assert {name for name, found in times.items() if found is not None} == {"switch", "k_lora"}
    assert times["switch"] == times["k_lora"] == TIMES


def fused_by(asked, **settings):
    """The comparison, where tuning notes what it is asked for and returns settings."""

    def tune(spaces, work, *, own, plain, trials, **options):
        asked.update({name: (own[name], space, plain[name], trials)
                      for name, space in spaces.items()})  # fmt: skip
        return {name: Choice(settings.get(name, {}), [], []) for name in spaces}

    world = SimpleNamespace(zoo=lambda seed: {}, zoo_digest="", base_folder="")
    run = SimpleNamespace(tune=tune, piece=lambda name, seed, **own: Piece(name, seed, {}, own),
                          only=())  # fmt: skip
    found = Fused(run, world, (0,))
    found.__dict__["encoder"] = Path(__file__)
    return found


@pytest.mark.fault("46 D7")
def test_all_that_is_tuned_has_as_many_trials_and_rates_are_among_it():
    asked, rate = {}, {"learning_rate": 0.01}
    methods = {one.name: one for one in fused_by(asked, layer_strengths=rate).methods()}
    assert asked.keys() == {*SPACES, BLIND, LAYERWISE, "adapter_strengths"}
    assert {trials for *_, trials in asked.values()} == {TRIALS}
    for name, (own, space, plain, _) in asked.items():
        assert plain.keys() == space.keys()
        if name in SPACES:
            assert plain == FIRST_TRIALS[name]
        else:  # tried first at the rate of gates, with fewer steps than what is compared
            assert plain == {"learning_rate": LIKE_GATES["learning_rate"]}
            assert own["steps"] < LIKE_GATES["steps"]
    for name, method in methods.items():
        rates = {piece["learning_rate"] for piece in method.trained.values()}
        assert rates <= ({0.01} if name.startswith(BLIND) else {LIKE_GATES["learning_rate"]})
        assert all(piece["steps"] == LIKE_GATES["steps"] for piece in method.trained.values())
    assert methods[BLIND].trained


def test_rivals_are_tried_as_published_first_within_what_is_searched():
    assert FIRST_TRIALS["sum"] == {FIRST: 1.0, OTHERS: 1.0, MANY: 1.0}
    assert FIRST_TRIALS["switch"] == {FIRST: 1.0, OTHERS: 1.0, "tau": 5}
    for name, box in SPACES.items():
        assert FIRST_TRIALS[name].keys() == box.keys()
        assert all(b[0] < FIRST_TRIALS[name][axis] < b[1] for axis, b in box.items())


def test_methods_that_have_seen_the_adapters_are_not_compared_on_new_ones():
    seen, fresh = {0: "folder"}, {0: "other"}
    methods = [
        Method("sum", "sum", {}), Method("alone1", "alone1", {}),
        Method("x_lora", "x_lora", {}, seen),
        Method("gates", "gates", {}, seen), Method(f"gates{FEWER}", "gates", {}, fresh),
        Method(LOWEST, "sum", {"leave": "lowest"}),
    ]  # fmt: skip
    found = {group: {m.name: m.trained for m in suiting(methods, group)} for group in GROUPS}
    assert found["new2"] == {"sum": {}, "alone1": {}, "gates": fresh}
    assert found["test2"] == {"sum": {}, "alone1": {}, "x_lora": seen, "gates": seen}
    assert found["test3"] == {"sum": {}, "gates": seen}
    assert found["useless3"] == {"sum": {}, "gates": seen, LOWEST: {}}


def test_a_useless_adapter_costs_what_it_adds_to_the_loss_of_each_pair():
    alone = {"none": [losses(3.0)], "gates": [losses(0.8), losses(0.801)], "sum": [losses(1.0)]}
    joined = {"gates": [1.08 * one for one in alone["gates"]], "none": [losses(3.0)]}
    joined[LOWEST] = [1.02 * alone["sum"][0]]
    row, lowest = costs_of_useless(alone, joined)
    assert (lowest.method, lowest.value) == (LOWEST, pytest.approx(math.log(1.02)))
    assert (row.method, row.task, row.metric) == ("gates", GROUPS["useless3"], USELESS)
    assert row.value == pytest.approx(math.log(1.08))


def test_every_variant_is_trained_as_what_ships():
    for name, own in VARIANTS.items():
        assert is_gated(own) == (name not in (LAYERWISE, "adapter_strengths"))
        assert {n: own[n] for n in LIKE_GATES} == LIKE_GATES


@pytest.mark.fault("46 D7")
@pytest.mark.parametrize(("adapters", "factor"), [(("a", "b"), 1.0), (("a", "b", "c"), 0.5)])
def test_the_tuned_sum_has_a_factor_of_its_own_for_more_than_two(adapters, factor):
    assert SPACES["sum"].keys() == {FIRST, OTHERS, MANY}
    model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    bundles = {
        n: LoraBundle("flux", {"0": Factors(torch.ones(1, 3), torch.ones(3, 1))}) for n in adapters
    }
    bench = Bench(SimpleNamespace(transformer=model), None)
    found = fusion_of(bench, "sum", {FIRST: 0.8, OTHERS: 1.2, MANY: 0.5}, bundles, None).strengths
    styles = dict.fromkeys(adapters[1:], pytest.approx(1.2 * factor))
    assert found == {"a": pytest.approx(0.8 * factor)} | styles
