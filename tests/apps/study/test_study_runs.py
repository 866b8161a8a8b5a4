"""Whole studies with a few steps, their reports, and the folder that knows its study."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from apps.main import main
from apps.study import gaussian_rates
from apps.study.comet import (
    best_sparse,
    drawn_settings,
    effect_of_search,
    expected_best,
    methods_of,
    trial_rows,
)
from apps.study.digit_training import measured, network_of
from apps.study.evomoe import bars, reached
from harness.evidence import Row
from harness.experiment import Choice, Piece
from studies.digits.multi_digits import glyphs, pairs
from studies.digits.two_digit_network import TwoDigitNetwork
from studies.evomoe.methods import METHODS

SMALL = ["--steps", "4", "--batch", "32", "--scored", "64", "--glyphs", "90,30,30"]


@pytest.fixture
def study(tmp_path, capsys):
    """Run a study and its report; return scores and the folder."""

    def run(name, *words, report=True):
        root = ["--root", str(tmp_path)]
        assert main(["study", name, *words, *root]) == 0, capsys.readouterr().err
        folder = tmp_path / "study" / name
        if report:
            assert main(["study", "report", name, *root]) == 0, capsys.readouterr().err
        return json.loads((folder / "scores.json").read_text()), folder

    return run


def values(scores, task, metric):
    rows = scores["rows"]
    return {r["method"]: r["value"] for r in rows
            if r["task"] == task and r["metric"] == metric and not r["versus"]}  # fmt: skip


@pytest.mark.costly("fits of four gates to samples, and their figures")
def test_rates_of_two_small_samples(study, capsys):
    words = ["--sizes", "100,200", "--repeats", "3", "--starts", "0.3"]
    scores, folder = study("gaussian-rates", *words)
    slopes = values(scores, "slopes, starts 0.3", "tau")
    assert slopes.keys() == {"identity", "tanh", "sigmoid", "gelu"}
    bars = {bar["name"]: bar["met"] for bar in scores["bars"]}
    assert bars["identity: change along the ridge"]
    assert bars["tanh: likelihood lost at half"]
    assert {"ridge.png", "ridge.csv", "rates.png"} <= {p.name for p in folder.glob("figures/*")}
    assert len(list(folder.glob("fits/*"))) == 15
    capsys.readouterr()
    study("gaussian-rates", *words, report=False)  # nothing is missing
    assert "making" not in capsys.readouterr().out


def test_the_ridge_changes_by_its_largest_loss_or_gain():
    rows = gaussian_rates._ridge_rows({"tanh": np.diag([-0.3, 0.0, 0.1])})
    assert {row.metric: row.value for row in rows} == {"largest change": 0.3, "lost at half": 0.3}


def test_gates_are_compared(study):
    some = "TopKGate,SoftmaxGate,SoftMoEGate,SinkhornGate,one-expert"  # others: test_digits.py
    scores, folder = study("gates", *SMALL, "--seeds", "0,1", "--only", some)
    assert len(values(scores, "test pairs", "mean accuracy")) == 5
    drawn = pairs(glyphs("test", (90, 30, 30)), 64, (0, 2)).glyphs.unique()
    assert {r["n"] for r in scores["rows"] if r["task"] == "test pairs"} == {len(drawn)}
    balanced = values(scores, "test pairs, balanced in evaluation", "mean accuracy")
    assert balanced.keys() == {"SinkhornGate"}
    active = values(scores, "what gates do", "active experts")
    assert active["TopKGate"] == 2
    assert active["SoftmaxGate"] == 8
    assert active["one-expert"] == 1
    assert values(scores, "what gates do", "load CV")["one-expert"] == pytest.approx(7**0.5)
    costs = values(scores, "what gates do", "kFLOPs")
    heads, gates = 2 * 64 * 10, 2 * 100 * 8
    assert costs["one-expert"] == pytest.approx(2 * (6400 + heads + gates) / 1000)
    assert costs["SoftmaxGate"] == pytest.approx(2 * (8 * 6400 + heads + gates) / 1000)
    assert {"accuracy.png", "accuracy.csv"} <= {p.name for p in folder.glob("figures/*")}
    assert (folder / "gates.json").is_file()
    assert [one["size"] for one in scores["data"]] == [90, 30, 30]


@pytest.mark.slow
def test_comet_is_tuned_like_its_rivals(study):
    scores, folder = study("comet", *SMALL, "--trials", "2", "--seeds", "0,1")
    assert values(scores, "test pairs", "mean accuracy").keys() == methods_of(2).keys()
    best = values(scores, "expected best of n trials", "2 trials")
    assert best.keys() == methods_of(2).keys()
    assert all(
        best[name] <= value
        for name, value in values(scores, "expected best of n trials", "1 trials").items()
    )
    assert len(values(scores, "middle of the search", "hardness")) == 3
    for name in methods_of(2):
        choice = json.loads((folder / f"choices/{name}-s100/result.json").read_text())["setting"]
        used = json.loads((folder / f"networks/{name}-s1/record.json").read_text())["settings"]
        assert {**used, **choice} == used
    assert len(values(scores, "search at equal learning rates", "error added")) == 4
    assert "trials-needed.png" in {p.name for p in folder.glob("figures/*")}


def test_gates_harden_to_one_expert(study):
    words = ["--temperatures", "0.3", "--hardening", "0.5", "--seeds", "0,1"]
    scores, folder = study("dense-to-sparse", *SMALL, *words)
    active = values(scores, "what gates do", "active experts")
    assert active["gumbel-0.3-at-0.5"] == active["softmax-0.3-at-0.5"] == 1
    assert (
        values(scores, "what gates do before hardening", "active experts")["gumbel-0.3-at-0.5"] > 1
    )
    before, hardened = (
        values(scores, task, "mean accuracy")
        for task in ("before hardening", "the same weights, hardened")
    )
    assert hardened.keys() == before.keys() == {"gumbel-0.3-at-0.5", "softmax-0.3-at-0.5"}
    assert hardened != before
    assert scores["bars"] == [
        {"name": "hardened gates: largest distance of active experts from 1", "value": 0.0,
         "sense": "<=", "bar": 0.0, "unit": "", "met": True}
    ]  # fmt: skip
    assert "hardening.png" in {p.name for p in folder.glob("figures/*")}


@pytest.fixture
def bytes_of_text(tmp_path):
    """Options of a small text and decoder."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, path in enumerate(sorted(Path("core_gates").rglob("*.py"))[:60]):
        (corpus / f"{number}.py").write_text(path.read_text()[:1500])
    sizes = {"updates": 64, "batch": 2, "context": 32, "dim": 16, "heads": 2, "layers": 2}
    return [f"--corpus=[{corpus}]", "--hidden=24", *(f"--{n}={v}" for n, v in sizes.items())]


def test_learning_rates_are_tuned_on_another_seed(study, bytes_of_text):
    words = ["--rates", "0.0001,0.01", "--seeds", "0", "--only", "dense"]
    scores, folder = study("evomoe", *bytes_of_text, *words, report=False)
    assert values(scores, "training", "learning rate") == {"dense": 0.01}
    assert {path.name for path in folder.glob("trials/*")} == {"dense-trial0-s100",
                                                               "dense-trial1-s100"}  # fmt: skip


@pytest.mark.slow
def test_evomoe_is_compared_at_equal_flops(study, bytes_of_text):
    words = ["--rates", "0.01", "--seeds", "0", "--only", "evomoe,switch"]
    scores, folder = study("evomoe", *bytes_of_text, *words)
    bits = values(scores, "test text", "bits per byte")
    assert bits.keys() == {"order 1", "order 5", "evomoe", "switch"}
    assert bits["order 5"] < bits["order 1"] < 6
    assert max(bits.values()) < 6
    flops = values(scores, "training", "FLOPs over the budget")
    assert all(value == pytest.approx(1, abs=0.01) for value in flops.values())
    assert values(scores, "training", "active experts")["evomoe"] == 1
    assert max(values(scores, "training", "logits changed").values()) <= 1e-6
    for mode in ("train", "eval"):
        changed = values(scores, "spawning", mode)
        assert len(changed) == 12
        assert changed["gumbel, temperature 2, 8 experts"] < 1e-6
    assert {"curves.png", "curves.csv", "kinds.png"} <= {p.name for p in folder.glob("figures/*")}
    assert (folder / "gates.json").is_file()


def test_the_claim_is_read_from_the_curves():
    switch = np.array([[10.0, 1, 3.0, 1], [20, 2, 2.5, 1]])
    evomoe = np.array([[10.0, 1, 2.8, 1], [15, 2, 2.5, 1], [20, 3, 2.4, 1]])
    assert reached(evomoe, switch, 0) == 0.75
    assert reached(evomoe, switch, 1) == 1
    assert math.isnan(reached(switch, evomoe, 0))


def test_bars_of_evomoe_take_the_worst_method():
    spawn = "gumbel, temperature 2, 8 experts"
    rows = [Row("order 1", "test text", "bits per byte", 3.5), Row(spawn, "spawning", "train", 0.0),
            Row(spawn, "spawning", "eval", 2e-6)]  # fmt: skip
    for name in METHODS:
        rows += [
            Row(name, "test text", "bits per byte", 3.0),
            Row(name, "training", "logits changed", 0),
        ]
        rows.append(Row(name, "training", "FLOPs over the budget", 1.02 if name == "hash" else 1.0))
        rows.append(Row(name, "training", "active experts", 2.0 if name == "top2" else 1.0))
    assert [bar.met for bar in bars(rows)] == [False, True, True, False, True]
    assert bars(rows[:1]) == []


def test_the_expected_best_is_the_closed_form():
    scores = [0.3, 0.1, 0.2, 0.4]
    found = expected_best(scores, 2)(np.array([[1.0, 1, 1, 1], [0, 2, 0, 0]]))
    pairs = [min(a, b) for a in scores for b in scores]
    assert found["1 trials"] == pytest.approx([np.mean(scores), 0.1])
    assert found["2 trials"] == pytest.approx([np.mean(pairs), 0.1])


def test_the_choice_is_the_best_of_the_sparse_ones():
    trials = [{"score": 0.1, "excess": 1.0}, {"score": 0.3, "excess": 0.05},
              {"score": 0.2, "excess": 0.0}, {"score": math.nan, "excess": 0.0}]  # fmt: skip
    assert best_sparse(trials) == 2
    assert best_sparse([{"score": 0.1, "excess": 2.0}, {"score": 0.5, "excess": 0.5}]) == 1


def test_a_trial_that_is_not_chosen_counts_as_the_worst():
    trials = [{"score": 0.1, "excess": 1.0}, {"score": 0.3, "excess": 0.0},
              {"score": 0.2, "excess": 0.05}]  # fmt: skip
    rows = trial_rows({"comet": Choice({}, trials, []), "topk": Choice({}, [], [])})
    found = {row.metric: row.value for row in rows}
    expected = expected_best([0.3, 0.3, 0.2], 3)(np.ones((1, 3)))
    assert found == pytest.approx({name: value[0] for name, value in expected.items()})


def test_what_a_search_adds_does_not_depend_on_the_rates_that_were_drawn():
    def trials(rates, step):
        return [{"learning_rate": r, "score": 0.2 + 0.1 * np.log(r / 2e-3) ** 2 + step}
                for r in rates]  # fmt: skip

    effect = effect_of_search(trials([5e-4, 1e-3, 2e-3], 0), trials([2e-3, 3e-3, 5e-3], -0.03))
    weights = np.array([[1.0, 1, 1, 1, 1, 1], [2, 1, 1, 0, 1, 1]])
    assert effect(weights)["error added"] == pytest.approx([-0.03, -0.03])


def test_settings_of_a_search_reach_the_network():
    tuned = {"learning_rate": 0.02, "gamma": 0.5, "entropy": 0.3, "search_steps": 0.2,
             "search_start": 0.05}  # fmt: skip
    methods = methods_of(2)
    assert all((one.gate == "PermutedGate") == (n[-1] == "+") for n, one in methods.items())
    settings = {**methods["comet+"].settings, "steps": 100, "experts": 8}
    network = network_of(Piece("comet+", 0, None, {**settings, **tuned}))
    assert network.learning_rate == 0.02
    assert network.losses == {"permutation_entropy": 1e-4, "entropy": 0.3}
    for gate in network.gates:
        assert (gate.search.num_steps, gate.search.start, gate.gate.gamma) == (20, 0.05, 0.5)


def test_settings_are_drawn_independently_of_each_other():
    few, more = drawn_settings("comet+", 3), drawn_settings("comet+", 12)
    assert more[:3] == few
    assert len({one["learning_rate"] for one in more}) == 12
    assert few[0].keys() == {"learning_rate", "gamma", "entropy", "search_steps", "search_start"}
    assert drawn_settings("softmax", 1)[0].keys() == {"learning_rate"}


def test_a_gate_that_is_closed_is_measured():
    network = TwoDigitNetwork("ReMoEGate", {}, {}).eval()
    for gate in network.gates:
        torch.nn.init.constant_(gate.weight, -1.0)
    found = measured(network, pairs(glyphs("test", (90, 30, 30)), 64, (0,)))
    assert found["pairs without an expert"] == 100
    assert found["active experts"] == 0
    assert math.isnan(found["load CV"])
