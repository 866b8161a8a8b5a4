"""Sizing networks stopped within an epoch and resumed equal uninterrupted ones, bit for bit."""

import lightning as L
import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.utils.data import DataLoader

from endoscopy.models import tiny_resnet
from endoscopy.training.sizing_module import SizingModule
from harness.command import GatesRunTrainer
from harness.runs.checkpoint import RunCheckpoint
from harness.runs.logger import ResumableCSVLogger

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]


class SizingData(L.LightningDataModule):
    """Random frames, two of each of twelve objects, whose brightness tells the size."""

    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        mm = torch.linspace(2, 20, 12).repeat_interleave(2)
        noise = torch.randn(len(mm), 3, 32, 32, generator=draw)
        self.frames = [
            {
                "streams": {"rgb": 0.5 * noise[i] + (mm[i] / 8).log()},
                "size_mm": mm[i],
                "object": torch.tensor(i // 2),
                "frame": torch.tensor(i),
            }
            for i in range(len(mm))
        ]

    def train_dataloader(self):
        return DataLoader(self.frames, batch_size=4, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.frames, batch_size=8)


class SmallSizing(SizingModule):
    """A network of few weights with dropout, gates in its trunk and head."""

    def __init__(self, mode):
        sizes = {"widths": [4, 4, 8], "depths": [1, 1]}
        model = tiny_resnet(("rgb",), hidden_dim=8, trunk_options=sizes)
        model.head.fc2 = torch.nn.Sequential(model.head.fc2, torch.nn.Dropout(0.3))
        super().__init__(model, gradient_routing=mode, every_k=3, clip=0.5, cycles=2)


@pytest.fixture
def fit(tmp_path):
    """Train in ``tmp_path/name``; a second call of that name resumes it."""
    from harness.runs.quiet import quiet_lightning

    quiet_lightning()

    def run(name, mode, *, max_steps=-1, half=False):
        folder = tmp_path / name
        seed_everything(5)
        options = {}
        if half:
            plugin = MixedPrecision("16-mixed", "cpu")
            # Grows every two steps until it overflows, so that its state matters.
            plugin.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=2)
            options = {"plugins": [plugin]}
        trainer = GatesRunTrainer(
            max_steps=max_steps,
            max_epochs=4,
            accelerator="cpu",
            log_every_n_steps=1,
            enable_model_summary=False,
            enable_progress_bar=False,
            default_root_dir=folder,
            logger=ResumableCSVLogger(folder),
            callbacks=[RunCheckpoint(every_n_steps=2, monitor="val/mae_mm")],
            **options,
        )
        last = folder / "checkpoints" / "last.ckpt"
        resume = str(last) if last.is_file() else None
        module = SmallSizing(mode)
        trainer.fit(module, SizingData(), ckpt_path=resume, weights_only=True)
        return folder

    return run


@pytest.mark.parametrize(
    ("mode", "half"), [("dual", False), ("every_k", False), ("reference", False), ("dual", True)]
)
def test_stopped_trainings_end_like_unbroken_ones(fit, same_checkpoint, mode, half):
    """An epoch has six steps: stopped within an epoch, twice, and at its end."""
    whole = fit("whole", mode, half=half)
    for stop in (2, 9, 12):
        fit("broken", mode, half=half, max_steps=stop)
    broken = fit("broken", mode, half=half)
    assert (whole / "metrics.csv").read_text() == (broken / "metrics.csv").read_text()
    for name in ("last.ckpt", "best.ckpt"):
        same_checkpoint(whole / "checkpoints" / name, broken / "checkpoints" / name)
    saved = torch.load(whole / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == saved["gradient_routing"]["num_steps"] == 24
    assert len(saved["optimizer_states"]) == 2
    assert saved["lr_schedulers"][0]["T_0"] == 2
    if half:
        assert saved["MixedPrecision"]["scale"] > 2.0**14


def test_a_resumed_training_takes_up_the_period_of_the_gates(fit):
    """Mode ``every_k`` of period 3, stopped after one step: the next two steps leave the gates."""
    fit("run", "every_k", max_steps=1)
    folder = fit("run", "every_k", max_steps=4)
    lines = (folder / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("train/gate_loss")
    cells = [line.split(",")[column] for line in lines[1:]]
    assert [cell != "nan" for cell in cells if cell] == [True, False, False, True]
