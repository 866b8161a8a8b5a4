"""Work that the tests of the engine hand to it, importable by its processes."""

import os
import time
from pathlib import Path

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from core_gates.errors import GatesError


def square(piece, job):
    """Return the square of a number; leaves a line behind for every call."""
    if log := piece.get("log"):
        with Path(log).open("a") as file:
            file.write(f"{piece.name} {os.getpid()} {torch.get_num_threads()}\n")
    if piece.method == "broken":
        raise GatesError("it does not work")
    if piece.get("seconds"):
        time.sleep(piece["seconds"])
    job.note(objects=[f"object{piece.seed}"], note="squared")
    job.tick()
    return {"score": float(piece.seed or 0) ** 2}


def bowl(piece, job):
    """Return the squared distance of log x from log 3; methods elsewhere have other optima."""
    best = {"inside": 3.0, "outside": 150.0, "nan": float("nan")}[piece.method]
    x = torch.tensor(piece["x"]).log() - torch.tensor(best).log()
    return {"score": float(x**2), "x_again": piece["x"]}


def up_to_two(piece, job):
    """Return less the larger x is; beyond 2 nothing has a score."""
    return {"score": -piece["x"] if piece["x"] <= 2.0 else float("nan")}


class Regression(L.LightningModule):
    """A linear regression with dropout."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 1))

    def training_step(self, batch, _):
        if stop := os.environ.get("KILL_AT"):
            file, step = stop.split("@")
            if self.global_step == int(step) and not Path(file).exists():
                Path(file).touch()
                os.kill(os.getpid(), 9)
        x, y = batch
        return (self.net(x + 0.1 * torch.randn_like(x)).squeeze(-1) - y).square().mean()

    def validation_step(self, batch, _):
        x, y = batch
        self.log("val/loss", (self.net(x).squeeze(-1) - y).square().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01)


class Points(L.LightningDataModule):
    """Random points of a plane."""

    def loader(self, num, seed, shuffle):
        x = torch.randn(num, 4, generator=torch.Generator().manual_seed(seed))
        return DataLoader(TensorDataset(x, x.sum(1)), 8, shuffle=shuffle)

    def train_dataloader(self):
        return self.loader(64, 1, shuffle=True)

    def val_dataloader(self):
        return self.loader(16, 2, shuffle=False)


def train(piece, job):
    """Train the regression; its weights are the result."""
    L.seed_everything(piece.seed, verbose=False)
    module = job.fit(
        Regression(), Points(), max_epochs=piece["epochs"], monitor=piece.get("monitor")
    )
    return dict(module.state_dict())
