"""Faulty calls of studies, and studies that are killed and resumed."""

from pathlib import Path

import pytest

SMALL = ["--steps", "20", "--batch", "16", "--scored", "32", "--glyphs", "40,20,20"]
RATES = ["study", "gaussian-rates"]
COMET = ["study", "comet"]
SPARSE = ["study", "dense-to-sparse"]
GATES = ["study", "gates"]
EVOMOE = ["study", "evomoe"]
OTHER = {"runs/study/x/study.json": '{"study": "comet"}'}


def damaged(name):
    content = '{"fingerprint": 3'
    return {f"runs/study/x/{name}": content}


TABLE = {
    "unknown method": ([*GATES, "--only", "TopGate"], "TopKGate"),
    "one expert": ([*GATES, "--experts", "1"], "--experts is 1, expected two or more"),
    "no seed": ([*COMET, "--seeds", "[]"], "--seeds is"),
    "a negative seed": ([*EVOMOE, "--seeds", "0,-1"], "expected a number from 0"),
    "a seed twice": ([*GATES, "--seeds", "1,1"], "several different ones"),
    "a part without glyphs": ([*COMET, "--glyphs", "1100,0,397"], "a part without glyphs"),
    "too many glyphs": ([*GATES, "--glyphs", "1100,300,398"], "1,797 in all at most"),
    "no steps": ([*GATES, "--steps", "0"], "expected positive numbers"),
    "no trials": ([*COMET, "--trials", "0"], "--trials must be at least 1"),
    "negative temperature": ([*SPARSE, "--temperatures", "0.3,-1"], "expected positive numbers"),
    "a temperature of NaN": ([*SPARSE, "--temperatures", "0.3,.nan"], "expected positive numbers"),
    "EvoMoE at NaN": ([*EVOMOE, "--temperatures", "2,.nan"], "expected two positive numbers"),
    "a rate of NaN": ([*EVOMOE, "--rates", "0.01,.nan"], "positive learning rates"),
    "an endless rate": ([*GATES, "--learning_rate", ".inf"], "expected positive numbers"),
    "a start at NaN": ([*RATES, "--starts", "0.3,.nan"], "positive numbers"),
    "horizon 0": ([*SPARSE, "--hardening", "0"], "two steps at least"),
    "threshold": ([*SPARSE, "--threshold", "0.125"], "expected less than 1 over 8 experts"),
    "k above E": ([*COMET, "--k", "9"], "--k is 9, expected 1 to the 8 of --experts"),
    "one size": ([*RATES, "--sizes", "1000"], "for a slope"),
    "one repeat": ([*RATES, "--repeats", "1"], "two repeats at least"),
    "a horizon of no updates": ([*EVOMOE, "--updates", "0"], "--updates is 0, expected 64"),
    "an empty batch": ([*EVOMOE, "--batch", "0"], "--batch 0, expected 1 at least"),
    "one expert of EvoMoE": ([*EVOMOE, "--experts", "1"], "--experts is 1, expected two or more"),
    "no layer of experts": ([*EVOMOE, "--layers", "1"], "--layers 1, expected 2 or more"),
    "cold EvoMoE": ([*EVOMOE, "--temperatures", "2,-1"], "expected two positive numbers"),
    "closed EvoMoE": ([*EVOMOE, "--threshold", "0.125"], "expected less than 1 over 8 experts"),
    "no decoder": ([*EVOMOE, "--heads", "7"], "the decoder cannot be built: dim=64"),
    "no rate": ([*EVOMOE, "--rates", "[]"], "positive learning rates"),
    "no text": ([*EVOMOE, "--corpus", "[]"], r"--corpus is \[\]"),
    "no method of EvoMoE": ([*EVOMOE, "--only", "evo"], "evomoe"),
    "another study": ([*RATES, "--name", "x"], "is a run of the study comet", OTHER),
    "no study": (["study", "report", "nothing"], "holds no study"),
    "damaged study": (["study", "report", "x"], "is damaged", damaged("study.json")),
    "not run": (["study", "report", "x"], "run `gates study comet` first", OTHER),
    "damaged piece": (
        [*GATES, "--name", "x", "--only", "TopKGate"],
        "TopKGate-s0 was made with other settings (its settings are not known)",
        damaged("networks/TopKGate-s0/record.json"),
    ),
    "quick and empty": ([*GATES, "--quick"], "nothing was trained yet"),
}


def test_faulty_inputs(faulty_inputs):
    faulty_inputs(TABLE)


def test_a_killed_study_ends_with_the_same_bits(kill_and_resume):
    words = ["--temperatures", "0.3", "--hardening", "0.5", "--seeds", "0,1", "--only",
             "gumbel-0.3-at-0.5"]  # fmt: skip
    command = [*SPARSE, *SMALL, *words]
    kill_and_resume(command, app="study", compare=["networks/*/*", "scores.json", "gates.json"])


@pytest.mark.slow  # the command starts four times, and packs, trains and scores
def test_a_killed_study_of_evomoe_ends_with_the_same_bits(kill_and_resume, tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, source in enumerate(3 * sorted(Path("core_gates/gates").glob("*.py"))):
        (corpus / f"{number}.py").write_text(source.read_text()[:300])
    words = ["--updates", "64", "--batch", "1", "--context", "8", "--dim", "8", "--heads", "1",
             "--layers", "2", "--hidden", "8", "--rates", "0.01", "--seeds", "0,1", "--only",
             "evomoe", f"--corpus=[{corpus}]"]  # fmt: skip
    compare = ["networks/*/*", "scores/*/*", "gates.json"]
    kill_and_resume([*EVOMOE, *words], app="study", compare=compare)
