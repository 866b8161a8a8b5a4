"""Scores of predicted classes and numbers, as means of samples that can be drawn again."""

from collections.abc import Sequence
from statistics import fmean, mode

import numpy as np
import torch
from torch import Tensor

from harness.evidence.bootstrap import Scores, moments
from language.adapt.labeled_texts import LabeledTexts

CONSTANT = "always the same"
ACCURACY, MATTHEWS, PEARSON = "accuracy", "matthews correlation", "pearson correlation"


def label_scores(outputs: Tensor, targets: Sequence[float], classes: int) -> list[Scores]:
    """Return accuracy and Matthews' correlation of classes, or Pearson's of numbers.

    Args:
        outputs: Of a model (N, C).
        targets: Number of the class of each row, or the number that was to be predicted.
        classes: Number of classes; 0 for numbers.

    Returns:
        Accuracy, with two classes also Matthews' correlation; Pearson's correlation of numbers.
    """
    wanted = np.asarray(targets)
    if not classes:
        return [_correlation(outputs[:, 0].numpy(), wanted, PEARSON)]
    found = outputs.argmax(1).numpy()
    scores = [moments(found == wanted, name=ACCURACY), _correlation(found, wanted, MATTHEWS)]
    return scores if classes == 2 else scores[:1]


def constant_scores(texts: LabeledTexts) -> list[Scores]:
    """Score the most frequent training label, or the mean label where labels are numbers."""
    trained, held_out = texts.targets(texts.train), texts.targets(texts.held_out)
    outputs = torch.full((len(held_out), texts.outputs), fmean(trained))
    if texts.classes:
        outputs = torch.arange(texts.outputs).eq(mode(trained)).float().expand(len(held_out), -1)
    return label_scores(outputs, held_out, len(texts.classes))


def _correlation(first: np.ndarray, second: np.ndarray, name: str) -> Scores:
    """Return Pearson's correlation; of two classes it is Matthews'. Constants have 0."""
    a, b = first.astype(float), second.astype(float)
    a, b = a - a.mean(), b - b.mean()
    return moments(np.stack([a, b, a * a, b * b, a * b], 1), _from_means, name=name)


def _from_means(means: np.ndarray) -> np.ndarray:
    a, b, aa, bb, ab = np.moveaxis(means, -1, 0)
    spread = np.maximum((aa - a * a) * (bb - b * b), 0)
    covariance = ab - a * b
    return np.divide(covariance, np.sqrt(spread), out=np.zeros_like(ab), where=spread > 1e-12)
