"""AUC within users, in both conventions of the literature."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from core_gates.errors import GatesError
from recsys.metrics.inputs import binary_rows


class GroupedAUC(NamedTuple):
    """The mean AUC of users, over those with rows of both classes.

    Attributes:
        weighted: Σ n_u AUC_u / Σ n_u, n_u the rows (or weight) of a user (Zhu et al., 2017; HoME,
            arXiv 2408.05430).
        mean: Every user counts the same (TorchEasyRec's ``GroupedAUC``).
        users: Users with both classes.
        excluded: Users without.
        reason: Why there is no value; else empty.
    """

    weighted: float
    mean: float
    users: int
    excluded: int
    reason: str = ""


class UserAUC(NamedTuple):
    """The AUC of every user, the moments that grouped AUC is made of.

    Attributes:
        users: (U,) users, ascending.
        auc: (U,), NaN where a user lacks one of the classes.
        weight: (U,) rows of each, or their weight.
    """

    users: np.ndarray
    auc: np.ndarray
    weight: np.ndarray


def gauc(
    scores: ArrayLike, labels: ArrayLike, users: ArrayLike, weights: ArrayLike | None = None
) -> GroupedAUC:
    """Return the grouped AUC in both conventions; O(N log N), without a loop over users.

    Args:
        scores: (N,).
        labels: (N,), 0 or 1.
        users: (N,) user of each row, integers or strings.
        weights: (N,) sample weights; 1 by default.

    Raises:
        GatesError: Lengths differ, a score is NaN, or a label is neither 0 nor 1.
    """
    return grouped(user_auc(scores, labels, users, weights))


def grouped(found: UserAUC) -> GroupedAUC:
    """Return the mean over users, weighted and not."""
    known = ~np.isnan(found.auc)
    count, excluded = int(known.sum()), int((~known).sum())
    if not count:
        return GroupedAUC(float("nan"), float("nan"), 0, excluded, "no user has both classes")
    areas, weight = found.auc[known], found.weight[known]
    weighted = float(areas @ weight / weight.sum())
    return GroupedAUC(weighted, float(areas.mean()), count, excluded)


def user_auc(
    scores: ArrayLike, labels: ArrayLike, users: ArrayLike, weights: ArrayLike | None = None
) -> UserAUC:
    """Return the AUC and the weight of every user; see :func:`gauc`."""
    values, positive, given = binary_rows(scores, labels, weights)
    names, index = numbered_users(users, len(values))
    order = np.argsort(values)
    order = order[np.argsort(index[order], kind="stable")]
    values, positive, given, owner = values[order], positive[order], given[order], index[order]
    first = np.ones(len(values), dtype=bool)
    first[1:] = (values[1:] != values[:-1]) | (owner[1:] != owner[:-1])
    starts = np.flatnonzero(first)
    if not len(starts):
        return UserAUC(names, np.zeros(0), np.zeros(0))
    own = np.add.reduceat(np.where(positive, given, 0.0), starts)
    tied = np.add.reduceat(np.where(positive, 0.0, given), starts)
    owner = owner[starts]
    size = len(names)
    positives = np.bincount(owner, own, size)
    negatives = np.bincount(owner, tied, size)
    before = np.concatenate(([0.0], negatives.cumsum()[:-1]))[owner]  # those of earlier users
    wins = np.bincount(owner, own * (tied.cumsum() - tied / 2 - before), size)
    pairs = positives * negatives
    areas = np.divide(wins, pairs, out=np.full(size, np.nan), where=pairs > 0)
    return UserAUC(names, areas, positives + negatives)


def numbered_users(users: ArrayLike, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct users (U,), ascending, and the number of each row's user (N,).

    Args:
        users: (N,) user of each row.
        rows: Rows N that there are.

    Raises:
        GatesError: There is not one user per row.
    """
    found = np.asarray(users)
    if found.shape != (rows,):
        raise GatesError(f"users have shape {found.shape}, expected one for each of {rows} rows")
    names, index = np.unique(found, return_inverse=True)
    return names, index.reshape(-1)
