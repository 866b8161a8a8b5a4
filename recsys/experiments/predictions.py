"""Probabilities of networks and baselines for all rows of a part, and what they score.

N rows, T tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from core_gates.errors import GatesError, check_option
from harness.evidence import Scores
from recsys.baselines import KINDS, BaseRates, Biases, Factorization, OneColumn, Predictor, Trees
from recsys.batch import Batch
from recsys.metrics import auc
from recsys.metrics.resampled import summed_log_loss, task_scores
from recsys.ranker import Ranker
from recsys.transform import FeatureTransform

Probabilities = NDArray[np.float64]
ROWS = 8192
NUMBERS = {"int": "a whole number", "float": "a number"}


@torch.no_grad()
def probabilities(ranker: Ranker, rows: Batch) -> Probabilities:
    """Return the probabilities (N, T) of a network in evaluation mode."""
    ranker.eval()
    parts = []
    for start in range(0, len(rows), ROWS):
        some = rows.take(slice(start, start + ROWS))
        logits = ranker(some.sparse, some.dense, some.sequences)
        parts.append(logits.double().sigmoid().numpy())
    return np.concatenate(parts)


def check_finite(ranker: Ranker, rows: Batch) -> None:
    """Refuse a network that has diverged.

    Args:
        ranker: The network.
        rows: Rows that it must have finite predictions of.

    Raises:
        GatesError: A prediction is not finite.
    """
    found = probabilities(ranker, rows)
    if count := int((~np.isfinite(found)).sum()):
        raise GatesError(
            f"{count} of {found.size} predictions are not finite, so the training has diverged: "
            "lower model.learning_rate, or what contest.space allows"
        )


def summed_log_loss_of(rows: Batch, found: Probabilities) -> float:
    """Return the sum over tasks of the mean log-loss of predictions (N, T)."""
    score = scores_of(rows, found, ())[""]
    users = len(np.unique(rows.user.numpy()))
    return float(score(np.ones((1, users)))["log_loss"][0])


def baseline(options: Mapping[str, Any], transform: FeatureTransform) -> Predictor:
    """Return an unfitted baseline.

    Args:
        options: Its ``kind``, ``column`` (one, or a mapping from task to column) or ``columns`` by
            name, and further arguments.
        transform: Which knows the places of columns.

    Raises:
        GatesError: The kind, a column or an argument is unknown, or an argument is wrong.
    """
    rest = dict(options)
    kind = str(rest.pop("kind", ""))
    check_option("kind of a baseline", kind, KINDS, GatesError)
    known = signature(KINDS[kind]).parameters
    for name, value in rest.items():
        if name in known and known[name].annotation in NUMBERS:
            _check_number(f"{name} of the baseline {kind}", value, str(known[name].annotation))
    try:
        return _baseline(kind, rest, transform)
    except (TypeError, ValueError) as error:
        raise GatesError(f"baseline {kind}: {error}") from error


def _baseline(kind: str, rest: dict[str, Any], transform: FeatureTransform) -> Predictor:
    sparse, dense = list(transform.sparse_tables), list(transform.dense_names)
    if kind == "base_rates":
        return BaseRates(**rest)
    if kind == "one_column":
        column, tasks = rest.pop("column", ""), transform.schema.task_names
        if isinstance(column, Mapping):
            if strangers := sorted(set(column) ^ set(tasks)):
                raise ValueError(f"column must name one for each task, see {strangers[0]!r}")
            return OneColumn([_place(column[task], dense) for task in tasks], **rest)
        return OneColumn(_place(column, dense), **rest)
    if kind == "biases":
        names = rest.pop("columns", sparse)
        places = [_place(name, sparse) for name in names]
        sizes = [transform.sizes[transform.sparse_tables[name]] for name in names]
        return Biases(places, sizes, **rest)
    if kind == "factorization":
        tables = transform.sparse_tables
        sides = {f.name: f.side for f in transform.schema.sparse}
        user, item = (
            [k for k, name in enumerate(sparse) if sides.get(name) == side]
            for side in ("user", "item")
        )
        return Factorization([transform.sizes[tables[n]] for n in sparse], user, item, **rest)
    names = rest.pop("columns", None)
    return Trees(None if names is None else [_place(name, sparse) for name in names], **rest)


def scores_of(
    rows: Batch, found: Probabilities, tasks: Sequence[str], *, exact_auc: bool = False
) -> dict[str, Scores]:
    """Return the scores of predictions, for :func:`harness.evidence.compare`.

    Args:
        rows: With labels, masks, weights and users.
        found: Probabilities (N, T).
        tasks: Names of the tasks.
        exact_auc: Whether intervals of the AUC are wanted, which cost rows × resamples.

    Returns:
        ``""`` for all tasks together, then each task by name.
    """
    labels, mask = rows.labels.numpy(), rows.mask.numpy()
    weight, user = rows.weight.numpy(), rows.user.numpy()
    known: dict[str, Scores] = {"": summed_log_loss(labels, found, user, mask=mask, weights=weight)}
    for number, task in enumerate(tasks):
        columns = labels[:, number], found[:, number], user
        known[task] = task_scores(
            *columns, mask=mask[:, number], weights=weight, exact_auc=exact_auc
        )
    return known


def mean_auc(rows: Batch, per_seed: Sequence[Probabilities], task: int) -> float:
    """Return the exact AUC of a task, averaged over the predictions of several seeds."""
    seen = rows.mask[:, task].numpy()
    labels, weight = rows.labels[:, task].numpy()[seen], rows.weight.numpy()[seen]
    return float(np.mean([auc(one[seen, task], labels, weight).value for one in per_seed]))


def _check_number(name: str, value: Any, annotation: str) -> None:
    right = int if annotation == "int" else int | float
    if isinstance(value, bool) or not isinstance(value, right):
        raise GatesError(f"{name} is {value!r}: expected {NUMBERS[annotation]}")


def _place(name: str, names: Sequence[str]) -> int:
    check_option("column of a baseline", name, names, GatesError)
    return list(names).index(name)
