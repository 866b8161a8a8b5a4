import numpy as np
import pytest

from harness.evidence import Difference
from harness.figures import drawn_numbers
from recsys.diagnosis import ExpertReport, LayerReport
from recsys.diagnosis.diagnose import Importance
from recsys.figures import (
    activations_figure,
    cosines_figure,
    gates_figure,
    importance_figure,
    ranked_list_figure,
    reliability_figure,
    scales_figure,
    sharing_figure,
)
from recsys.figures.reliability import binomial_interval
from recsys.metrics import reliability


def report(std=(1.0, 2.0, 50.0), gradients=True):
    """Two tasks, each with an own expert, and a shared one that the first task has taken."""
    weights = np.array([[0.05, 0, 0.95], [0, 0.9, 0.1]])
    layer = LayerReport(
        "level 1",
        ("view", "like"),
        ("view 0", "like 0", "shared 0"),
        ("view", "like", "shared"),
        ("view", "like"),
        zero_rate=np.array([0, 0.3, 0.9]),
        near_zero_rate=np.array([0.05, 0.35, 0.92]),
        mean=np.zeros(3),
        std=np.array(std),
        effective_rank=np.array([3.0, 2, 1]),
        weights=weights,
        visible=weights > 0,
        row_entropy=np.array([0.1, 0.2]),
        gradients=np.array([[1.0, 0, 9], [0, 2, 1]]) if gradients else None,
        cosines=np.array([[1, -0.4], [-0.4, 1]]) if gradients else None,
    )
    return ExpertReport((layer,), ("view", "like"), (100, 5), 512)


EMPTY = ExpertReport((), ("view",), (3,), 10, ("the model has no layer of experts",))


def cells(figure):
    return [row[-1] for row in drawn_numbers(figure) if row[1] == "cell"]


def test_activations():
    figure = activations_figure(report())
    numbers = drawn_numbers(figure)
    assert [row[3] for row in numbers if row[1] == "point"] == [1, 2, 50]
    assert figure.axes[0].get_xscale() == "log"
    assert activations_figure(report((1.0, 1.1, 1.2))).axes[0].get_xscale() == "linear"
    with pytest.raises(ValueError, match="the model has no layer of experts"):
        activations_figure(EMPTY)


@pytest.mark.parametrize(
    ("std", "reached"),
    [((1.0, 2.0, 50.0), True), ((0.5, 0.6, 0.7), False), ((2.0, 3.0, 90.0), True),
     ((3.0, 4.0, 90.0), False), ((2.0, 3.0, 4.0), True)],
)  # fmt: skip
def test_a_line_is_named_where_it_can_be_seen(std, reached):
    for figure in (activations_figure(report(std)), scales_figure({"home": report(std)})):
        low, high = figure.axes[0].get_xlim()
        assert (low <= 1 <= high) == reached
        assert any("dashed" in text.get_text() for text in figure.texts) == reached


def test_scales_of_models():
    figure = scales_figure({"cgc": report(), "plain": EMPTY, "dead": report((0.0, 1.0, 1.5))})
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["50.0×, 0.90", "∞×, 0.90"]
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["cgc, level 1", "dead, level 1"]
    with pytest.raises(ValueError, match="no layer of experts: plain"):
        scales_figure({"plain": EMPTY})


def test_gates():
    figure = gates_figure(report())
    assert cells(figure) == pytest.approx([0.05, np.nan, 0.95, np.nan, 0.9, 0.1], nan_ok=True)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == [".05", ".95", ".90", ".10"]
    assert len(figure.axes[0].patches) == 2  # framed


def test_sharing():
    figure = sharing_figure(report())
    assert cells(figure) == pytest.approx([0.95 / 1.05, 0.1 / 1.05, 0.9, 0.1])
    assert len(sharing_figure(report(gradients=False)).axes) == 1
    with pytest.raises(ValueError, match="were not measured"):
        sharing_figure(EMPTY)


def test_cosines():
    assert cells(cosines_figure(report())) == pytest.approx(
        [np.nan, -0.4, -0.4, np.nan], nan_ok=True
    )
    with pytest.raises(ValueError, match="were not measured"):
        cosines_figure(report(gradients=False))


def test_importance():
    gap = Difference(0.2, 0.1, 0.3, 0.01, 50)
    found = [
        Importance(f"field {i}", gap, {"view": gap._replace(value=i, low=-1)}) for i in range(40)
    ]
    figure = importance_figure(found, tasks=["view"])
    points = [row for row in drawn_numbers(figure) if row[1] == "point"]
    assert len(points) == 60
    assert points[31][3] == 1
    with pytest.raises(ValueError, match="no importance for like"):
        importance_figure(found, tasks=["like"])
    with pytest.raises(ValueError, match="no field was permuted"):
        importance_figure([])


def test_reliability():
    rng = np.random.default_rng(0)
    probs = rng.random((500, 5)) * 0.2
    labels = rng.random((500, 5)) < probs
    labels[:, 4] = False
    bins = {f"task {t}": reliability(probs[:, t], labels[:, t]) for t in range(5)}
    figure = reliability_figure(bins)
    assert len(figure.axes) == 5
    drawn = [row for row in drawn_numbers(figure) if row[0] == "task 1" and row[2] == "line 2"]
    assert [row[3] for row in drawn] == pytest.approx(bins["task 1"].predicted.tolist())
    assert [row[4] for row in drawn] == pytest.approx(bins["task 1"].observed.tolist())
    assert "no positive, ECE" in figure.axes[4].texts[0].get_text()
    with pytest.raises(ValueError, match="tasks are empty"):
        reliability_figure({})


def test_ranked_list():
    predicted, true = np.array([[0.1], [0.9], [0.5]]), np.array([[0.2], [0.8], [0.4]])
    figure = ranked_list_figure(
        ["x", "y", "z"], ["view"], predicted, true=true, observed=[[1], [0], [0]],
        scores=predicted[:, 0], most=2,
    )  # fmt: skip
    numbers = drawn_numbers(figure)
    assert [row[5] for row in numbers if row[1] == "bar"] == [0.9, 0.5]
    assert [row[3] for row in numbers if row[1] == "point"] == [0.8, 0.4]
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["1. y", "2. z"]
    assert len(ranked_list_figure(["x"], ["a", "b"], [[0.1, 0.2]]).axes) == 2
    with pytest.raises(ValueError, match=r"expected items and tasks \(1, 2\)"):
        ranked_list_figure(["x"], ["a", "b"], [[0.1]])


def test_frequencies_have_binomial_intervals():
    low, high = binomial_interval([0.0, 0.5, 1.0], [10, 100, 10])
    assert low == pytest.approx([0, 0.4038, 0.7225], abs=1e-4)
    assert high == pytest.approx([0.2775, 0.5962, 1], abs=1e-4)
