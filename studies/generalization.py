"""Small photographs with classes, for the study of gates beyond endoscopy."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from core_gates import GradientRouting
from core_gates.errors import GatesError
from core_gates.training.gradient_routing import Mode
from endoscopy.metrics import confusion_matrix, macro_f1
from endoscopy.models.trunks import (
    GateKind,
    TinyResNet,
    gate_parameters,
    gate_trunk,
    weight_parameters,
)
from harness.evidence import Resamples, Scores

FASHION_FOLDER = "/usr/share/datasets/fashion-mnist"
FASHION_PACKAGE = "dataset-fashion-mnist"
_MAGIC = {1: 2049, 3: 2051}


class LabeledImages(NamedTuple):
    """Images of K classes in three disjoint parts.

    Attributes:
        train: (N,1,H,W) float32 in [0, 1] and (N,) int64 labels.
        validation: The same, to choose by.
        test: The same, to report on.
        num_classes: K.
    """

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    num_classes: int


def digits(seed: int = 0) -> LabeledImages:
    """Return the 1,797 handwritten digits of scikit-learn, 8 x 8, stratified 60/20/20 %."""
    data: Any = load_digits()
    images = (data.images / 16.0).astype(np.float32)
    rest, test = train_test_split(
        np.arange(len(images)), test_size=0.2, stratify=data.target, random_state=seed
    )
    train, validation = train_test_split(
        rest, test_size=0.25, stratify=data.target[rest], random_state=seed
    )
    first, second, third = (
        _tensors(images[rows], data.target[rows]) for rows in (train, validation, test)
    )
    return LabeledImages(first, second, third, num_classes=10)


def fashion_mnist(
    folder: str | os.PathLike[str] = FASHION_FOLDER, validation: int = 10_000, seed: int = 0
) -> LabeledImages:
    """Read Fashion-MNIST (Xiao et al. 2017), 28 x 28; validation comes out of the training part.

    Args:
        folder: Holds ``train-images-idx3-ubyte.gz`` and so on, by default where Debian's package
            ``dataset-fashion-mnist`` puts them.
        validation: Training images set aside, equally many of each class.
        seed: Of their choice.

    Raises:
        GatesError: A file is absent or damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise GatesError(
            f"{folder} is absent: install the Debian package {FASHION_PACKAGE} or name a folder "
            "with the four idx files of Fashion-MNIST"
        )
    parts: dict[str, tuple[NDArray[Any], NDArray[Any]]] = {}
    for name in ("train", "t10k"):
        images = read_idx(folder / f"{name}-images-idx3-ubyte.gz", 3)
        labels = read_idx(folder / f"{name}-labels-idx1-ubyte.gz", 1)
        if len(images) != len(labels):
            raise GatesError(f"{folder} has {len(images)} {name} images and {len(labels)} labels")
        parts[name] = (images / np.float32(255.0), labels)
    pixels, classes = parts["train"]
    train, held = train_test_split(
        np.arange(len(classes)), test_size=validation, stratify=classes, random_state=seed
    )
    return LabeledImages(
        _tensors(pixels[train], classes[train]),
        _tensors(pixels[held], classes[held]),
        _tensors(*parts["t10k"]),
        num_classes=10,
    )


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Read a compressed idx file of bytes.

    Raises:
        GatesError: The file is absent, damaged, or has other dimensions.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        what = getattr(error, "strerror", None) or str(error)
        raise GatesError(f"{path} cannot be read: {what}; install or copy it again") from error
    start = 4 * (dimensions + 1)
    header = np.frombuffer(content[:start].ljust(start, b"\0"), dtype=">i4")
    shape = tuple(int(side) for side in header[1:])
    if header[0] != _MAGIC[dimensions] or len(content) - start != np.prod(shape):
        raise GatesError(f"{path} is not an idx file of {dimensions} dimensions; copy it again")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)


def _tensors(images: NDArray[Any], labels: NDArray[Any]) -> tuple[Tensor, Tensor]:
    pixels = torch.from_numpy(np.array(images, dtype=np.float32))
    return pixels[:, None], torch.from_numpy(np.array(labels, dtype=np.int64))


Variant = Literal["plain", "gates, dual", "gates, joint", "gates, off", "LayerScale"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
_BUILD: dict[str, tuple[GateKind, Mode]] = {
    "plain": ("none", "off"),
    "gates, dual": ("fsg", "dual"),
    "gates, joint": ("fsg", "joint"),
    "gates, off": ("fsg", "off"),
    "LayerScale": ("layer_scale", "off"),
}


@dataclass(frozen=True)
class Budget:
    """What every variant gets.

    Args:
        epochs: Passes over the training images; the last network is tested, none is chosen.
        batch: Images a step.
        learning_rate: Peak of the weights, AdamW with a cosine schedule.
        gate_learning_rate: Constant, of the gates, Adam.
        weight_decay: Of the weights.
        widths: Channels of the stem and the stages.
        num_train: Training images used, the first ones; all if None.
    """

    epochs: int = 25
    batch: int = 64
    learning_rate: float = 3e-3
    gate_learning_rate: float = 1e-2
    weight_decay: float = 1e-4
    widths: tuple[int, ...] = (16, 16, 32, 64)
    num_train: int | None = None


def generalization_study(
    data: LabeledImages,
    *,
    variants: Sequence[Variant] = VARIANTS,
    seeds: Iterable[int] = range(5),
    budget: Budget | None = None,
    tick: Callable[[], None] = lambda: None,
) -> pd.DataFrame:
    """Train every variant with every seed and predict the images held out.

    Variants of one seed share the weights at the start, as far as they have them, and the batches.
    Nothing is chosen by the validation images, so they are tested too.

    Args:
        data: `studies.generalization.digits` or ``fashion_mnist``.
        variants: Which to train.
        seeds: Of weights and batches.
        budget: The same for all.
        tick: Called after each training run.

    Returns:
        One row a (variant, seed, sample): variant, seed, sample, label, predicted.
    """
    budget = budget or Budget()
    images, labels = (torch.cat(parts) for parts in zip(data.validation, data.test, strict=True))
    tables = []
    for seed in seeds:
        for variant in variants:
            model = _train(variant, data, budget, seed)
            with torch.no_grad():
                parts = [model(part).argmax(1) for part in images.split(512)]
            tables.append(
                pd.DataFrame(
                    {
                        "variant": variant,
                        "seed": seed,
                        "sample": np.arange(len(labels)),
                        "label": labels.numpy(),
                        "predicted": torch.cat(parts).numpy(),
                    }
                )
            )
            tick()
    return pd.concat(tables, ignore_index=True)


def generalization_table(
    predictions: pd.DataFrame, *, reference: str = "plain", resamples: int = 2000
) -> pd.DataFrame:
    """Average accuracy and macro F1 over seeds, and compare with the reference.

    Args:
        predictions: Of `generalization_study`.
        reference: The variant to compare with, paired by test image and seed.
        resamples: Bootstrap resamples over images and seeds.

    Returns:
        One row per variant: variant, seeds, accuracy and macro_f1 with ``_low``, ``_high`` and,
        except for the reference, ``_difference``, ``_difference_low``, ``_difference_high`` and
        ``_p_value``.
    """
    scores = {
        str(variant): [_scores(seed_rows) for _, seed_rows in group.groupby("seed", sort=True)]
        for variant, group in predictions.groupby("variant", sort=False)
    }
    draws = Resamples.clusters(np.unique(predictions["sample"]), resamples=resamples)
    rows = []
    for variant, ours in scores.items():
        row: dict[str, object] = {"variant": variant, "seeds": len(ours)}
        for name, interval in draws.intervals(ours).items():
            row |= {
                name: interval.value,
                f"{name}_low": interval.low,
                f"{name}_high": interval.high,
            }
        if variant != reference:
            for name, gap in draws.differences(ours, scores[reference]).items():
                row |= {
                    f"{name}_difference": gap.value, f"{name}_difference_low": gap.low,
                    f"{name}_difference_high": gap.high, f"{name}_p_value": gap.p,
                }  # fmt: skip
        rows.append(row)
    return pd.DataFrame(rows)


def _train(variant: Variant, data: LabeledImages, budget: Budget, seed: int) -> nn.Module:
    kind, mode = _BUILD[variant]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        depths = (1,) * (len(budget.widths) - 1)
        trunk = TinyResNet(data.train[0].shape[1], budget.widths, depths)
        model = nn.Sequential(trunk, nn.Linear(trunk.num_features, data.num_classes))
        gate_trunk(trunk, kind)
    gates = list(gate_parameters(model).values())
    optimizer = torch.optim.AdamW(
        weight_parameters(model).values(), budget.learning_rate, weight_decay=budget.weight_decay
    )
    gate_optimizer = torch.optim.Adam(gates, budget.gate_learning_rate) if mode != "off" else None
    routing = GradientRouting(optimizer, gate_optimizer, mode=mode)
    images, labels = (part[: budget.num_train] for part in data.train)
    num_steps = budget.epochs * -(-len(labels) // budget.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(budget.epochs):
        for rows in torch.randperm(len(labels), generator=generator).split(budget.batch):
            routing.step(model, partial(_loss, images[rows], labels[rows]))
            schedule.step()
    return model.eval()


def _loss(images: Tensor, labels: Tensor, model: nn.Module) -> Tensor:
    return F.cross_entropy(model(images), labels)


def _scores(rows: pd.DataFrame) -> Scores:
    ordered = rows.sort_values("sample")
    truth, called = ordered["label"].to_numpy(), ordered["predicted"].to_numpy()
    num_classes = int(max(truth.max(), called.max())) + 1
    hit = (truth == called).astype(float)

    def scores(weights: np.ndarray) -> dict[str, np.ndarray]:
        matrix = confusion_matrix(truth, called, num_classes=num_classes, weights=weights)
        return {"accuracy": weights @ hit / weights.sum(-1), "macro_f1": macro_f1(matrix)}

    return scores
