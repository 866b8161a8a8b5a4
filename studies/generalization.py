"""Do gates help outside endoscopy? Small networks on small images, the same budget for all."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core_gates import GradientRouting
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
from studies.image_sets import LabeledImages

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
        data: :func:`studies.image_sets.digits` or ``fashion_mnist``.
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
        predictions: Of :func:`generalization_study`.
        reference: The variant to compare with, paired by test image and seed.
        resamples: Bootstrap resamples over images and seeds.

    Returns:
        One row per variant: variant, seeds, accuracy and macro_f1 with ``_low``, ``_high`` and,
        except for the reference, ``_difference``, ``_difference_low``, ``_difference_high`` and
        ``_p_value``.
    """
    scores = {
        str(variant): [_scores(one) for _, one in group.groupby("seed", sort=True)]
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


def _scores(one: pd.DataFrame) -> Scores:
    ordered = one.sort_values("sample")
    truth, called = ordered["label"].to_numpy(), ordered["predicted"].to_numpy()
    num_classes = int(max(truth.max(), called.max())) + 1
    hit = (truth == called).astype(float)

    def scores(weights: np.ndarray) -> dict[str, np.ndarray]:
        matrix = confusion_matrix(truth, called, num_classes=num_classes, weights=weights)
        return {"accuracy": weights @ hit / weights.sum(-1), "macro_f1": macro_f1(matrix)}

    return scores
