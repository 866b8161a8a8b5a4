"""Sizing networks trained by gradient routing on two processes against one."""

import lightning as L
import pytest
import torch
from torch.distributed import is_initialized
from torch.utils.data import DataLoader

from core_gates.training.batch_norm import SyncBatchNorm
from endoscopy.models import tiny_resnet
from endoscopy.training.sizing_module import SizingModule
from tests.distributed.lightning_fits import fit, rows_of_rank, validation_scores

STEPS, BATCH = 5, 8
FEW = (
    ("dual", "adam", "64-true", 1),
    ("reference", "adam", "64-true", 2),
    ("joint", "sgd", "32-true", 1),
)
MORE = (
    ("dual", "sgd", "32-true", 1),
    ("dual", "adam", "64-true", 2),
    ("every_k", "adam", "64-true", 1),
    ("off", "adam", "64-true", 1),
)
SLOW = pytest.mark.slow


class Frames(L.LightningDataModule):
    """Random frames of two streams; each rank gets every other row."""

    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        rows = STEPS * BATCH
        rgb = torch.randn(rows, 3, 32, 32, generator=draw, dtype=torch.float64)
        depth = torch.randn(rows, 1, 32, 32, generator=draw, dtype=torch.float64)
        mm = 2 + 18 * torch.rand(rows, generator=draw, dtype=torch.float64)
        self.frames = [
            {
                "streams": {"rgb": rgb[i] + (mm[i] / 8).log(), "depth": depth[i]},
                "geometry": rgb[i, 0, 0, :4],
                "size_mm": mm[i],
                "object": torch.tensor(i // 2),
                "frame": torch.tensor(i),
            }
            for i in range(rows)
        ]

    def train_dataloader(self):
        own = rows_of_rank(len(self.frames))
        return DataLoader(self.frames, batch_size=len(own) // STEPS, sampler=own)

    val_dataloader = train_dataloader


def train(mode, optimizer, precision, accumulate, folder):
    """Return the state of the network after five steps, and the scores of validation."""
    torch.manual_seed(0)
    options = {"widths": [4, 4, 8, 8, 8]}
    model = tiny_resnet(("rgb", "depth"), hidden_dim=8, geometry=True, trunk_options=options)
    module = SizingModule(
        model,
        gradient_routing=mode,
        every_k=2,
        optimizer=optimizer,
        learning_rate=0.01,
        gate_learning_rate=0.02,
        clip=0.5,
        gate_clip=0.02,
        accumulate=accumulate,
    )
    data = Frames()
    for frame in data.frames:
        if precision == "32-true":
            frame["streams"] = {name: x.float() for name, x in frame["streams"].items()}
            frame["size_mm"], frame["geometry"] = (
                frame["size_mm"].float(),
                frame["geometry"].float(),
            )
    trainer = fit(module, data, folder, precision=precision)
    assert trainer.global_step == STEPS
    assert bool(sum(isinstance(m, SyncBatchNorm) for m in module.modules())) == is_initialized()
    assert str(next(module.parameters()).dtype) == f"torch.float{precision[:2]}"
    return {"state": dict(module.model.state_dict()), "scores": validation_scores(trainer)}


def train_all(runs, folder):
    return [train(*run, folder) for run in runs]


@pytest.fixture(scope="module")
def results(ranks, tmp_path_factory, request):
    """What one process and two ranks make of runs."""
    folder = str(tmp_path_factory.mktemp("ranks"))
    one = train_all(request.param, folder)
    return request.param, one, ranks(train_all, request.param, folder, timeout=300.0)


RUNS = [
    pytest.param(runs, run, marks=marks, id="-".join(map(str, run)))
    for runs, marks in ((FEW, ()), (MORE, SLOW))
    for run in runs
]


@pytest.mark.parametrize(("results", "run"), RUNS, indirect=["results"], scope="module")
def test_two_ranks_equal_one_process(results, run):
    runs, alone, pairs = results
    one, pair = alone[runs.index(run)], [of_rank[runs.index(run)] for of_rank in pairs]
    torch.manual_seed(0)
    options = {"widths": [4, 4, 8, 8, 8]}
    start = tiny_resnet(("rgb", "depth"), hidden_dim=8, geometry=True, trunk_options=options)
    for name, tensor in start.state_dict().items():
        expected = one["state"][name].double()
        moves = (expected - tensor.double()).abs().max()
        if name.endswith("gate.logits"):
            assert (moves > 1e-6) == (run[0] != "off"), name
        if name.endswith(("conv1.weight", "running_mean", "fc3.weight")):
            assert moves > 1e-4, name
        for result in pair:
            assert (result["state"][name].double() - expected).abs().max() <= 1e-6, name


@pytest.mark.parametrize(
    "results", [FEW, pytest.param(MORE, marks=SLOW)], ids=["few", "more"], indirect=True
)
def test_validation_counts_the_objects_of_all_ranks(results):
    _, alone, pairs = results
    for one, *pair in zip(alone, *pairs, strict=True):
        for result in pair:
            assert result["scores"] == pytest.approx(one["scores"], rel=1e-4)
        assert {"val/loss", "val/mae_mm", "val/macro_f1"} <= one["scores"].keys()
