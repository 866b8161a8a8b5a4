"""Figures show the numbers that they are given, and refuse what does not fit."""

import numpy as np
import pytest
import torch

from diffusion.evaluation.figures import (
    gate_map_figure,
    openness_figure,
    pair_differences_figure,
    retrieval_figure,
    retrieval_table,
    sheet_figure,
)
from diffusion.fusion.baking import GateMap


def texts(figure):
    found = [text.get_text() for text in figure.texts]
    for axes in figure.axes:
        found += [label.get_text() for label in (*axes.get_xticklabels(), *axes.get_yticklabels())]
        found += [axes.get_title(loc="left")]
    return found


def plain(value, count, size=4):
    return np.full((count, size, size, 3), value, dtype=np.uint8)


def test_a_sheet_has_every_image_in_its_place():
    rows = {
        "noto": {"real": plain(10, 2), "made": plain(20, 2)},
        "inverted": {"real": plain(30, 2), "made": plain(40, 2)},
    }
    figure = sheet_figure(rows, ["apple", "$\\frac pear"], title="Styles", note="unseen")
    (axes,) = figure.axes
    sheet = axes.images[0].get_array()
    columns = [round(x) for x in axes.get_xticks()]
    lines = [round(y) for y in axes.get_yticks()]
    assert [[int(sheet[y, x, 0]) for x in columns] for y in lines] == [
        [10, 10, 20, 20], [30, 30, 40, 40],
    ]  # fmt: skip
    assert {"noto", "inverted", "apple", "Styles", "real", "made"} <= set(texts(figure))
    figure.canvas.draw()  # a dollar in a caption is no formula


def test_rows_of_a_sheet_have_the_same_groups(refuses):
    refuses(
        ValueError,
        (
            "same groups",
            lambda: sheet_figure(
                {"a": {"real": plain(1, 2)}, "b": {"real": plain(1, 3)}}, title="x"
            ),
        ),
        ("same groups", lambda: sheet_figure({}, title="x")),
    )


def test_gate_maps_show_means_by_layer_and_step():
    means = torch.rand(3, 2, 2)
    means[:, 1, 0] = torch.nan
    gates = GateMap(("blocks.0.a", "blocks.1.b"), ("fruit", "noto"), means)
    figure = gate_map_figure(gates, note="a $\\frac prompt")
    maps = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    np.testing.assert_allclose(maps[1], means[:, :, 1].T)
    assert maps[0].mask[1].all()
    assert f"fruit: {float(means[:, 0, 0].mean()):.2f}" in texts(figure)
    figure.canvas.draw()
    with pytest.raises(ValueError, match="empty"):
        gate_map_figure(GateMap((), (), torch.empty(0, 0, 0)))


def test_openness_is_shown_by_prompt_and_adapter():
    opened = {"a dotted fish": {"fish": 0.9, "dotted": 0.25}, "a $\\frac cup": {"cup": 1.0}}
    figure = openness_figure(opened, [("fish",), ("cup", "rayed")])
    (axes,) = figure.axes
    np.testing.assert_allclose(axes.images[0].get_array().filled(-1), [[0.9, 0.25], [1.0, -1]])
    shown = {text.get_text(): text.get_fontweight() for text in axes.texts}
    assert shown == {"fish 0.90": "bold", "dotted 0.25": "normal", "cup 1.00": "bold"}
    figure.canvas.draw()  # a dollar in a prompt is no formula


def test_the_closest_adapter_of_each_concept_is_marked():
    scores = np.array([[0.5, 0.1], [0.4, 0.2]])
    figure = retrieval_figure(scores, ["a", "b"], ["a", "b"], note="mean")
    right, wrong = figure.axes[0].collections
    assert (right.get_offsets().tolist(), wrong.get_offsets().tolist()) == ([[0, 0]], [[0, 1]])
    assert any("closest and right: 1 of 2" in text for text in texts(figure))
    header, rows = retrieval_table(scores, ["a", "b"], ["a", "b"])
    assert (rows[2], len(header)) == (["b", "a", 0.4], 3)
    with pytest.raises(ValueError, match="expected"):
        retrieval_figure(scores, ["a"], ["a", "b"])


def test_pairs_are_ordered_by_what_gates_gain():
    differences = {"sum": np.log([1.1, 0.8, 1.0]), "mean": np.log([1.3, 0.9, 0.95])}
    (axes,) = pair_differences_figure(["p", "q", "r"], differences).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["q", "r", "p"]
    np.testing.assert_allclose(axes.collections[0].get_offsets()[:, 0], [-20, 0, 10], atol=1e-9)
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["than sum in 33 %", "than mean in 67 %"]
    for wrong in ({}, {"sum": np.zeros(2)}):
        with pytest.raises(ValueError, match="3 pairs"):
            pair_differences_figure(["p", "q", "r"], wrong)
