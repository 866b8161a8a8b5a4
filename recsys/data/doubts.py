"""What makes results on some rows doubtful: too few of them, labels that say nothing, base rates.

Each line tells what was found and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from harness.evidence import Row
from recsys.data.tables import RankingTables
from recsys.inputs import Batch
from recsys.schema import FeatureSchema
from recsys.transform.targets import read_targets

FEWEST = 1_000  # training rows, below which a result is mostly chance
MISSING_USERS = 0.01  # of the training rows, from which they are told
HIERARCHICAL = "HoME"
RIGHT = 0.8, 1.25  # predicted over observed
POSITIVES = 100  # held out, from which predicted over observed is judged


def of_rows(tables: RankingTables) -> tuple[str, ...]:
    """Return remarks on training rows: too few, one class, labels or users missing."""
    schema, train = tables.schema, tables.train
    targets, doubts = read_targets(train, schema), []
    if len(train) < FEWEST:
        doubts.append(
            f"{len(train):,} training rows are few: what fewer than {FEWEST:,} teach is mostly "
            "chance"
        )
    for task, labels, mask in zip(schema.tasks, targets.labels.T, targets.mask.T, strict=True):
        if len(distinct := np.unique(labels[mask])) == 1:
            doubts.append(
                f"the label {task.column or task.name!r} is {distinct[0]:g} in all training rows: "
                "nothing can be learned of it, leave it out"
            )
    if (missing := float(np.mean(targets.user < 0))) >= MISSING_USERS:
        doubts.append(
            f"{missing:.0%} of the training rows have no {schema.user!r}: each counts as another "
            "user, and none is recognized later"
        )
    return tuple(doubts)


def of_hierarchy(nets: Iterable[str], schema: FeatureSchema) -> tuple[str, ...]:
    """Return that the hierarchy of HoME is empty, where one of the networks is one."""
    if HIERARCHICAL not in nets or len(schema.categories) > 1:
        return ()
    names = ", ".join(f"{name}: CATEGORY" for name in schema.task_names[:2])
    return (
        f"all tasks are in one category, so that the hierarchy of {HIERARCHICAL} is empty: give "
        f"them categories, as labels {{{names}}} do",
    )


def of_loss(method: str, loss: float, gap: Row) -> tuple[str, ...]:
    """Return that a network does not beat base rates, unless the interval of the gap is below 0.

    Args:
        method: Name of the network.
        loss: Its log-loss, summed over tasks.
        gap: Its difference from that of base rates, on the same rows.
    """
    if not (gap.high >= 0 or gap.value >= 0):  # of one user there is no interval, NaN
        return ()
    return (
        f"{method} is not shown to beat base rates, {loss:.4f} against "
        f"{loss - gap.value:.4f}, difference [{gap.low:.4f}, {gap.high:.4f}]: it is not worth "
        "serving; see the notes on the rows, give it more of them, or larger penalties",
    )


def of_rates(
    method: str, tasks: Iterable[str], rows: Batch, found: NDArray[np.float64]
) -> Iterator[str]:
    """Yield predicted over observed of all tasks in one line, then one for each that is far off.

    Args:
        method: Name of the network.
        tasks: T names.
        rows: Held out (N,).
        found: Probabilities (N, T).
    """
    labels, mask = rows.labels.double().numpy(), rows.mask.numpy()
    weight, positives = mask * rows.weight.double().numpy()[:, None], (mask * labels).sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = (weight * found).sum(0) / (weight * labels).sum(0)
    rated = [(t, r, n) for t, r, n in zip(tasks, ratios, positives, strict=True) if n > 0]
    yield f"{method}, predicted over observed: " + ", ".join(f"{t} {r:.2f}" for t, r, _ in rated)
    for task, ratio, count in rated:
        if count >= POSITIVES and not RIGHT[0] <= ratio <= RIGHT[1]:
            yield (
                f"WARNING: {method} predicts {task} {ratio:.2f} times as often as it occurs, "
                f"{count:,.0f} times in the rows held out: give the model `intercepts: "
                "validation`, or train on more recent rows"
            )
