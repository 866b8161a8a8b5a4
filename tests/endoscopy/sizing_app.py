"""The smallest sizing application: a network of few weights on frames in memory."""

import sys
from collections.abc import Sequence

import lightning as L
import torch
from torch.utils.data import DataLoader

from apps.cli import GatesCLI
from apps.main import App
from apps.main import main as front_door
from apps.trainer import GatesTrainer
from endoscopy.models import tiny_resnet
from endoscopy.module import SizingModule


class SizingData(L.LightningDataModule):
    """Random frames, two of each object, whose brightness tells the size.

    Args:
        num_objects: Objects.
    """

    def __init__(self, num_objects: int = 12) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        mm = torch.linspace(2, 20, num_objects).repeat_interleave(2)
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

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.frames, batch_size=4, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.frames, batch_size=8)


class SmallSizing(SizingModule):
    """A gated network whose first stage drops paths at random.

    Args:
        gradient_routing: Mode.
        every_k: Period of mode every_k.
    """

    def __init__(self, gradient_routing: str = "every_k", every_k: int = 3) -> None:
        sizes = {"widths": [4, 4, 8], "depths": [1, 1]}
        model = tiny_resnet(("rgb",), hidden_dim=8, trunk_options=sizes)
        model.head.fc2 = torch.nn.Sequential(model.head.fc2, torch.nn.Dropout(0.3))
        super().__init__(
            model, gradient_routing=gradient_routing, every_k=every_k, clip=0.5, cycles=2
        )


class SizingCLI(GatesCLI):
    app = "sizing"
    verbs = ("fit",)


def main(arguments: Sequence[str]) -> None:
    SizingCLI(SmallSizing, SizingData, GatesTrainer, arguments)


if __name__ == "__main__":
    table = {"sizing": App("sizing_app", "small", {"fit": "train"})}
    sys.exit(front_door(["sizing", *sys.argv[1:]], table))
