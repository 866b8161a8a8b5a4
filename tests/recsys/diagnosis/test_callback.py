import csv

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from core_gates.gates.mixture import MaskedMixture
from core_gates.moe.normed_experts import NormedExperts
from recsys.diagnosis.diagnose import ExpertReportCallback
from recsys.inputs import Batch
from recsys.models.net import ExpertLayer, MultiTaskNet
from recsys.schema import Task

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
