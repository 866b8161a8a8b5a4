"""The smallest application: a noisy regression with dropout, used to test the command line."""

import sys
from collections.abc import Sequence

import torch
from lightning.pytorch import LightningDataModule, LightningModule, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from apps.main import App
from apps.main import main as front_door
from core_gates import GatesError
from harness.command import GatesRunCLI, GatesRunTrainer
from harness.evidence import Bar, Resamples, compare, moments
from harness.experiment import Arrays, Job, Piece, job
from harness.files import write_json

SPACES = {name: {"model.lr": (0.01, 0.1)} for name in ("narrow", "wide")}


class ToyModule(LightningModule):
    """Linear regression with dropout.

    Args:
        dim: Number of features.
        lr: Learning rate.
    """

    def __init__(self, dim: int = 8, lr: float = 0.05) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        self.lr = lr
        self.net = nn.Sequential(nn.Linear(dim, 16), nn.Dropout(0.2), nn.SiLU(), nn.Linear(16, 1))
        self.register_buffer("steps_seen", torch.zeros(()))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = (self.net(x + 0.1 * torch.randn_like(x)).squeeze(-1) - y).square().mean()
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        return loss

    def on_train_batch_end(self, *_: object) -> None:
        self.steps_seen += 1  # a state change after Lightning's own point of saving

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("val/loss", (self.net(x).squeeze(-1) - y).square().mean())

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class ToyData(LightningDataModule):
    """Random features with a linear target.

    Args:
        dim: Number of features.
        batch_size: Samples of a batch.
        num_samples: Samples of the training set.
        num_workers: Processes that load.
    """

    def __init__(
        self, dim: int = 8, batch_size: int = 8, num_samples: int = 52, num_workers: int = 0
    ) -> None:
        super().__init__()
        self.dim, self.batch_size, self.num_samples = dim, batch_size, num_samples
        self.num_workers = num_workers

    def training_objects(self) -> list[str]:
        return [f"sample{number}" for number in range(self.num_samples)]

    def _set(self, num: int, seed: int) -> TensorDataset:
        x = torch.randn(num, self.dim, generator=torch.Generator().manual_seed(seed))
        return TensorDataset(x, x @ torch.arange(1.0, self.dim + 1))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(
            self._set(self.num_samples, 1),
            self.batch_size,
            shuffle=True,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self._set(16, 2), self.batch_size)


class Student(ToyModule):
    """A smaller network, trained by a separate verb.

    Args:
        dim: Number of features.
        lr: Learning rate.
        width: Hidden features.
    """

    def __init__(self, dim: int = 8, lr: float = 0.05, width: int = 4) -> None:
        super().__init__(dim, lr)
        self.net = nn.Sequential(nn.Linear(dim, width), nn.SiLU(), nn.Linear(width, 1))


def train(piece: Piece, job: Job) -> dict[str, Tensor]:
    """Train a student; a sloppy one takes the random numbers that it finds."""
    if not piece.get("sloppy"):
        seed_everything(piece.seed, verbose=False)
    module = Student(lr=piece["model.lr"], width={"narrow": 2, "wide": 8}[piece.method])
    return dict(job.fit(module, ToyData(), max_epochs=piece["epochs"]).state_dict())


def errors(piece: Piece, weights: dict[str, Tensor]) -> Tensor:
    """Return the squared errors of a trained student on the validation samples."""
    module = Student(width={"narrow": 2, "wide": 8}[piece.method]).eval()
    module.load_state_dict(weights)
    x, y = ToyData().val_dataloader().dataset.tensors
    return (module.net(x).squeeze(-1) - y).square().detach()


def trial(piece: Piece, job: Job) -> dict[str, float]:
    """Return the error of a setting."""
    return {"score": float(errors(piece, train(piece, job)).mean())}


class ToyTrainer(GatesRunTrainer):
    """A Trainer with verbs apart from the others."""

    def tune(self, model: ToyModule, datamodule: ToyData, trials: int = 2, epochs: int = 3) -> None:
        """Choose the learning rate of two students."""
        self.run().tune(SPACES, trial, trials=trials, epochs=epochs)

    def evaluate(
        self,
        model: ToyModule,
        datamodule: ToyData,
        seeds: tuple[int, ...] = (0, 1),
        trials: int = 2,
        epochs: int = 3,
        sloppy: bool = False,
        quick: bool = False,
    ) -> None:
        """Tune two students, train what is missing, compare them."""
        run, settings = self.run(quick=quick), {"sloppy": sloppy or None, "epochs": epochs}
        chosen = run.tune(SPACES, trial, trials=trials, **settings)
        pieces = [run.piece(m, s, **settings, **chosen[m].setting) for m in chosen for s in seeds]
        store = run.store("weights", Arrays())
        scores: dict[str, list] = {method: [] for method in SPACES}
        for piece in run.obtain(store, pieces, train, ticks=epochs):
            scores[piece.method].append(moments(errors(piece, store.load(piece)), name="mse"))
        rows = compare(scores, Resamples.clusters(range(16)), task="toy", reference="narrow")
        run.finish(rows, [Bar("error", r.value, "<=", 1.0) for r in rows[:1]], seeds=seeds)

    def score(self, model: ToyModule, datamodule: ToyData, repeats: int = 1) -> None:
        """Write the score of the network.

        Args:
            model: Filled in by the command line.
            datamodule: Filled in by the command line.
            repeats: How often to score.
        """
        if repeats < 1:
            raise GatesError(f"--repeats must be at least 1, found {repeats}")
        write_json(self.run_folder.path / "score.json", {"repeats": repeats})


class ToyCLI(GatesRunCLI):
    app = "toy"
    verbs = ("fit", "distill", "score", "tune", "evaluate", "report")
    trains = frozenset({"fit", "distill"})
    neutral = ("data.num_workers",)

    def add_arguments_to_parser(self, parser) -> None:
        super().add_arguments_to_parser(parser)
        parser.link_arguments("model.dim", "data.dim")


def main(arguments: Sequence[str]) -> None:
    ToyCLI(Student if arguments[0] == "distill" else ToyModule, ToyData, ToyTrainer, arguments)


if __name__ == "__main__":
    job.SAVED_EVERY = 0.0  # so that a kill finds a checkpoint
    verbs = dict.fromkeys(ToyCLI.verbs, "a verb")
    table = {"toy": App("toy", "a toy", verbs)}
    sys.exit(front_door(["toy", *sys.argv[1:]], table))
