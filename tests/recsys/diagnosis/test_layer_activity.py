"""What layers do while they train: observers and the callback."""

import csv

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from core_gates.gates import DSelectKGate, MultiGate
from core_gates.gates.mixture import MaskedMixture
from core_gates.moe.normed_experts import NormedExperts
from recsys.diagnosis.diagnose import ExpertReportCallback
from recsys.diagnosis.layer_activity import gate_weights, visible_experts
from recsys.inputs import Batch
from recsys.models.net import ExpertLayer, MultiTaskNet
from recsys.schema import Task


def test_a_mixture_without_self_gates_has_no_residual_path():
    x = torch.randn(7, 3)
    mixture = MaskedMixture(3, torch.tensor([[True, False, True], [True, True, True]]))
    found = gate_weights(mixture, x)
    torch.testing.assert_close(found.gates, mixture.weights(x))
    assert found.residual is None


def test_self_gates_are_taken_out():
    x = torch.randn(7, 3)
    seen, own = torch.ones(2, 3, dtype=torch.bool), torch.eye(2, 3, dtype=torch.bool)
    mixture = MaskedMixture(3, seen, self_mask=own)
    found = gate_weights(mixture, x)
    torch.testing.assert_close(found.gates.sum(-1), torch.ones(7, 2))
    torch.testing.assert_close(found.gates + found.residual, mixture.weights(x))
    assert (found.residual[:, own] > 0).all()
    assert (found.residual[:, ~own] == 0).all()


class WithResidual(nn.Module):
    def weights(self, x):
        return torch.full((len(x), 1, 2), 0.5) + self.residual_weights(x)

    def residual_weights(self, x):
        return torch.tensor([[-2.0, 0.0]]).expand(len(x), 1, 2)


class Free(nn.Module):
    """As AdaTT: gates in a module, free weights on top."""

    def __init__(self):
        super().__init__()
        self.gates = MaskedMixture(3, torch.ones(1, 2, dtype=torch.bool))

    def weights(self, x):
        return self.gates.weights(x) + torch.tensor([0.0, 3.0])


def test_a_mixture_may_name_its_residual_path():
    found = gate_weights(WithResidual(), torch.randn(4, 3))
    assert found.gates.tolist() == [[[0.5, 0.5]]] * 4
    assert found.residual[0].tolist() == [[-2.0, 0.0]]
    found = gate_weights(Free(), torch.randn(4, 3))
    torch.testing.assert_close(found.gates.sum(-1), torch.ones(4, 1))
    torch.testing.assert_close(found.residual, torch.tensor([0.0, 3.0]).expand(4, 1, 2))


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
    assert visible_experts(WithResidual()) is None


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
        loss = torch.nn.functional.binary_cross_entropy_with_logits
        return loss(self(batch), batch.labels)

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
    loader = DataLoader(batches(), batch_size=None, num_workers=0)
    trainer.fit(module, loader)
    return module


def logged(folder, name):
    with (folder / "metrics.csv").open() as file:
        return [(int(r["step"]), float(r[name])) for r in csv.DictReader(file) if r.get(name)]


def test_reports_come_every_n_steps_on_the_same_rows(tmp_path):
    callback = ExpertReportCallback(every=2, rows=20)
    fit(tmp_path, callback)
    found = logged(tmp_path, "experts/scale_ratio")
    assert [step for step, _ in found] == [1, 3, 5]
    assert len({value for _, value in found}) == 3
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
    rows = batches(2, size=7)
    callback = ExpertReportCallback(every=1, batches=rows)
    fit(tmp_path, callback, accumulate=2)
    assert callback.report.rows == 14
    assert [step for step, _ in logged(tmp_path, "experts/zero_rate_max")] == [1, 2, 3]


def test_faults():
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        ExpertReportCallback(every=0)
