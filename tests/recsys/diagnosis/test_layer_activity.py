"""What layers do while they train: observers, the callback, and figures of it."""

import csv
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from core_gates import DSelectKGate, MaskedMixture, MultiGate, NormedExperts
from harness.evidence import Difference
from harness.figures import drawn_numbers
from recsys import Task
from recsys.diagnosis import ExpertReport, LayerReport
from recsys.diagnosis.diagnose import ExpertReportCallback, Importance
from recsys.diagnosis.layer_activity import gate_weights, visible_experts
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
from recsys.inputs import Batch
from recsys.metrics import reliability
from recsys.models import ExpertLayer, MultiTaskNet


def test_a_mixture_may_name_its_residual_path():
    named = SimpleNamespace(weights=lambda x: x, residual_weights=lambda x: x - 0.5)
    free = SimpleNamespace(weights=lambda x: x, gates=SimpleNamespace(weights=lambda x: x / 4))
    for mixture, gates, residual in ((named, 0.5, 0.5), (free, 0.25, 0.75)):
        found = gate_weights(mixture, torch.ones(1))
        assert (float(found.gates), float(found.residual)) == (gates, residual)


def test_routing_gates_are_measured():
    gates = MultiGate([DSelectKGate(3, 4, k=2) for _ in range(2)])
    x = torch.randn(5, 3)
    found = gate_weights(gates, x, ids=None)
    torch.testing.assert_close(found.gates, gates.weights(x))
    assert found.residual is None


@pytest.mark.fault("video R5")
def test_masks_tell_what_gates_see():
    mask = torch.tensor([[True, False, True], [True, True, False]])
    assert torch.equal(visible_experts(MaskedMixture(3, mask, self_mask=~mask)), mask)
    gates = MultiGate([DSelectKGate(3, 2, k=1) for _ in range(2)], mask)
    assert torch.equal(visible_experts(gates), mask)
    assert visible_experts(SimpleNamespace()) is None


@pytest.mark.fault("video R5")
def test_an_expert_with_several_outputs_is_seen_if_one_of_them_is():
    mask = torch.tensor([[True, False, False, False], [False, False, True, True]])
    mixture = MaskedMixture(3, mask)
    mixture.expert_of_output = [0, 1, 1, 2]
    assert visible_experts(mixture).tolist() == [[True, False, False], [False, True, True]]


pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]


class Toy(MultiTaskNet):
    def __init__(self):
        super().__init__(4, [Task("a"), Task("b")])
        self.experts = NormedExperts(3, 4, [5])
        self.mixture = MaskedMixture(4, torch.ones(2, 3, dtype=torch.bool))

    def forward(self, v, prior=None):
        return self.mixture(v, self.experts(v)).sum(-1)

    def expert_layers(self):
        names = tuple(f"shared {e}" for e in range(3))
        return [
            ExpertLayer("layer 1", self.experts, self.mixture, names, ("shared",) * 3, ("a", "b"))
        ]


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Toy()

    def forward(self, batch):
        return self.net(batch.dense)

    def training_step(self, batch, _):
        return torch.nn.functional.binary_cross_entropy_with_logits(self(batch), batch.labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def batches(number=6, size=32):
    torch.manual_seed(1)
    empty = torch.zeros(size, 0, dtype=torch.int64)
    return [
        Batch(
            empty,
            torch.randn(size, 4),
            (),
            (torch.rand(size, 2) < 0.3).float(),
            torch.ones(size, 2, dtype=torch.bool),
            torch.ones(size),
            torch.arange(size),
        )
        for _ in range(number)
    ]


def fit(folder, *callbacks, accumulate=1):
    torch.manual_seed(0)
    module = Module()
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=CSVLogger(folder, name="", version=""),
        callbacks=list(callbacks),
        log_every_n_steps=1,
        accumulate_grad_batches=accumulate,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(batches(), batch_size=None, num_workers=0))
    return module


def logged(folder, name):
    with (folder / "metrics.csv").open() as file:
        return [(int(r["step"]), float(r[name])) for r in csv.DictReader(file) if r.get(name)]


def test_reports_come_every_n_steps_on_the_same_rows(tmp_path):
    callback = ExpertReportCallback(every=2, rows=20)
    fit(tmp_path, callback)
    found = logged(tmp_path, "experts/scale_ratio")
    assert ([step for step, _ in found], len({value for _, value in found})) == ([1, 3, 5], 3)
    assert callback.report.rows == 20
    assert callback.report.summary()["scale_ratio"] == pytest.approx(found[-1][1], rel=1e-4)
    assert callback.report.layers[0].gradients is None


def test_training_is_not_changed(tmp_path):
    alone = fit(tmp_path / "a").state_dict()
    callback = ExpertReportCallback(every=1, gradients=True)
    watched = fit(tmp_path / "b", callback).state_dict()
    assert all(torch.equal(alone[name], watched[name]) for name in alone)
    assert callback.report.layers[0].gradients.min() > 0


def test_given_batches_are_measured_and_accumulated_steps_reported_once(tmp_path):
    callback = ExpertReportCallback(every=1, batches=batches(2, size=7))
    fit(tmp_path, callback, accumulate=2)
    assert callback.report.rows == 14
    assert [step for step, _ in logged(tmp_path, "experts/zero_rate_max")] == [1, 2, 3]


def test_faults():
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        ExpertReportCallback(every=0)


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
    assert [row[3] for row in drawn_numbers(figure) if row[1] == "point"] == [1, 2, 50]
    assert figure.axes[0].get_xscale() == "log"
    assert activations_figure(report((1.0, 1.1, 1.2))).axes[0].get_xscale() == "linear"
    with pytest.raises(ValueError, match="the model has no layer of experts"):
        activations_figure(EMPTY)


def test_scales_of_models():
    figure = scales_figure({"cgc": report(), "plain": EMPTY, "dead": report((0.0, 1.0, 1.5))})
    assert [text.get_text() for text in figure.axes[0].texts] == ["50.0×, 0.90", "∞×, 0.90"]
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["cgc, level 1", "dead, level 1"]
    with pytest.raises(ValueError, match="no layer of experts: plain"):
        scales_figure({"plain": EMPTY})


def test_gates():
    figure = gates_figure(report())
    assert cells(figure) == pytest.approx([0.05, np.nan, 0.95, np.nan, 0.9, 0.1], nan_ok=True)
    assert [text.get_text() for text in figure.axes[0].texts] == [".05", ".95", ".90", ".10"]
    assert len(figure.axes[0].patches) == 2  # framed


def test_sharing():
    assert cells(sharing_figure(report())) == pytest.approx([0.95 / 1.05, 0.1 / 1.05, 0.9, 0.1])
    assert len(sharing_figure(report(gradients=False)).axes) == 1
    with pytest.raises(ValueError, match="were not measured"):
        sharing_figure(EMPTY)


def test_cosines():
    assert cells(cosines_figure(report())) == pytest.approx(
        [np.nan, -0.4, -0.4, np.nan], nan_ok=True
    )
    with pytest.raises(ValueError, match="were not measured"):
        cosines_figure(report(gradients=False))


def test_importance(refuses):
    gap = Difference(0.2, 0.1, 0.3, 0.01, 50)
    found = [
        Importance(f"field {i}", gap, {"view": gap._replace(value=i, low=-1)}) for i in range(40)
    ]
    figure = importance_figure(found, tasks=["view"])
    points = [row for row in drawn_numbers(figure) if row[1] == "point"]
    assert (len(points), points[31][3]) == (60, 1)
    refuses(
        ValueError,
        ("no importance for like", lambda: importance_figure(found, tasks=["like"])),
        ("no field was permuted", lambda: importance_figure([])),
    )


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
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["1. y", "2. z"]
    assert len(ranked_list_figure(["x"], ["a", "b"], [[0.1, 0.2]]).axes) == 2
    with pytest.raises(ValueError, match=r"expected items and tasks \(1, 2\)"):
        ranked_list_figure(["x"], ["a", "b"], [[0.1]])


def test_frequencies_have_binomial_intervals():
    low, high = binomial_interval([0.0, 0.5, 1.0], [10, 100, 10])
    assert low == pytest.approx([0, 0.4038, 0.7225], abs=1e-4)
    assert high == pytest.approx([0.2775, 0.5962, 1], abs=1e-4)
