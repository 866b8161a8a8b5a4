"""What methods score on parts of the test rows: new users, new items, activity, exposure.

N test rows, T tasks, U users of a part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import polars as pl

from harness.evidence import Row, Scores, SingleUnit, compare
from recsys.batch import Batch
from recsys.columns.canonical import canonical, keys_of, kind_of
from recsys.data.tables import RankingTables
from recsys.experiments.predictions import Probabilities
from recsys.metrics import per_user_sums, standard_slices, user_resamples
from recsys.metrics.log_loss import losses
from recsys.metrics.resampled import ratio
from recsys.metrics.slices import Slices

SLICES, COUNT = "slices", "test rows"
LOSS = "log-loss"


def slices_of(tables: Sequence[RankingTables], random: str = "") -> dict[str, np.ndarray]:
    """Return the parts of the test rows of several splits, one split after the other (N,).

    Args:
        tables: A data set in each of its splits.
        random: Column that is not 0 where an item was shown at random; none if it is absent.

    Returns:
        See :func:`recsys.metrics.standard_slices`; nothing for data without user or item.
    """
    schema = tables[0].schema
    if not schema.user or not schema.item:
        return {}
    found = [_of_split(one, schema.user, schema.item, random) for one in tables]
    names = dict.fromkeys(name for one in found for name in one)
    nothing = [np.zeros(len(one.test), dtype=bool) for one in tables]
    return {
        name: np.concatenate([one.get(name, no) for one, no in zip(found, nothing, strict=True)])
        for name in names
    }


def slice_rows(
    rows: Batch,
    slices: Slices,
    found: Mapping[str, Sequence[Probabilities]],
    *,
    reference: str | None,
    resamples: int = 1000,
) -> list[Row]:
    """Return the summed log-loss of all methods on each part, and what they lose to the reference.

    Intervals are those of the users of the part; ``test rows`` counts its rows.

    Args:
        rows: Test rows.
        slices: Name of a part -> its rows (N,).
        found: Method -> predictions (N, T), one for each seed.
        reference: Method that all others are compared with.
        resamples: Of the intervals.
    """
    mask = rows.mask.numpy()
    weight = mask * rows.weight.double().numpy()[:, None]
    positive = rows.labels.numpy() == 1
    lost = {m: [losses(one, positive) * weight for one in own] for m, own in found.items()}
    users, made, counts = rows.user.numpy(), [], []
    for name, part in slices.items():
        metric, own_users = f"{LOSS}, {name}", users[part]
        mass = per_user_sums(own_users, weight[part])[1]
        scores = {
            m: [_summed(metric, per_user_sums(own_users, one[part])[1], mass) for one in own]
            for m, own in lost.items()
        }
        draws = user_resamples(own_users, resamples=resamples)
        made += compare(scores, draws, task=SLICES, reference=reference)
        counts.append(Row(COUNT, SLICES, metric, int(part.sum()), n=draws.units))
    return [*made, *counts]


def _of_split(tables: RankingTables, user: str, item: str, random: str) -> dict[str, np.ndarray]:
    train, test = tables.train, tables.test
    train_users, users = _numbered(train[user], test[user])
    train_items, items = _numbered(train[item], test[item])
    shown = test[random].fill_null(0).to_numpy() != 0 if random in test.columns else None
    return standard_slices(
        users, items, train_users=train_users, train_items=train_items, random=shown
    )


def _numbered(train: pl.Series, test: pl.Series) -> tuple[np.ndarray, np.ndarray]:
    """Return numbers of the ids of both columns; a test row without an id is of none that is known.

    Missing ones of training rows share the number -1, those of test rows -2.
    """
    both = pl.concat([train, test])
    missing = keys_of(canonical(both, kind_of(both.name, both.dtype) or "integer"))[1]
    found = both.rank("dense").fill_null(0).cast(pl.Int64).to_numpy()
    first, count = np.where(missing, -1, found), len(train)
    return first[:count], np.where(missing, -2, found)[count:]


def _summed(metric: str, sums: np.ndarray, mass: np.ndarray) -> Scores:
    """Return the sum over tasks of the mean loss, from sums of losses and weights (U, T)."""
    known = mass.sum(0) > 0
    scores = partial(_scores, metric, sums[:, known], mass[:, known])
    alone = int(mass.any(1).sum()) == 1
    return SingleUnit(scores, [metric] if alone else [])


def _scores(
    metric: str, sums: np.ndarray, mass: np.ndarray, drawn: np.ndarray
) -> dict[str, np.ndarray]:
    return {metric: ratio(drawn @ sums, drawn @ mass).sum(-1)}
