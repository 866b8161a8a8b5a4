"""Learned gates next to rules: rows, densities, arithmetic and the sentence."""

import json

import numpy as np
import pytest

from apps.language.seqboat.activation_figure import tree_figure
from apps.language.seqboat.activation_study import headline
from harness.evidence import Row
from harness.files.piece import read_record


def test_rows_differ_in_which_tokens_attend_alone(gates):
    words = ("language", "evaluate", "--config", "small", "--study", "activation", "--seeds", "0")
    gates.succeed(*words)
    run = gates.folder / "runs/language/small"
    rows = json.loads((run / "scores.json").read_text())["rows"]
    cost = {(r["method"], r["metric"]): r["value"] for r in rows}
    density = {name: cost[name, "density of layer 2"] for name in ("always", "never")}
    assert density == {"always": 1, "never": 0}
    flops = {n: cost[n, "MFLOPs of matmuls a sequence"] for n in ("always", "learned", "never")}
    assert flops["never"] <= flops["learned"] <= flops["always"]
    settings = {
        n: dict(read_record(run / f"weights/{n}-s0").settings) for n in ("learned", "random")
    }
    drawn = settings["random"].pop("model.model.init_args.densities")
    assert settings["random"] == settings["learned"]
    assert all(0 <= number <= 1 for number in drawn)
    assert {r["method"] for r in rows if r["versus"]} == {"always", "never", "random"}
    assert "missing" not in gates.succeed(*words).out


@pytest.mark.parametrize("attends", [False, True])
def test_a_picture_says_that_no_token_attends(attends):
    figure = tree_figure(["a", "[", "]", "$"], np.full((2, 4), attends), "text", 0.5)
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert texts[:4] == ["a", "[", "]", "$"]
    assert texts[4].startswith("no token attends") is not attends


def test_the_headline_says_what_rules_reach():
    def row(method, value, versus="", low=-1.0, high=1.0, p=1.0):
        return Row(method, "test", "accuracy", value, low, high, 9, versus, p)

    rows = [row("learned", 0.9), row("never", 0.91), row("random", 0.7)]
    rows += [row("never", 0.01, "learned"), row("random", -0.2, "learned", -0.3, -0.1, 0.01)]
    assert headline(rows) == (
        "Learned gates have accuracy 0.900; never (0.910) is level with them, random (0.700) is"
        " below them."
    )
    assert headline([]) == "Learned gates are not trained."
