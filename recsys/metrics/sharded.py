"""Metrics over ranks: rows are routed to the rank of their user, then counted once."""

import torch
from torch import Tensor
from torch import distributed as dist

from core_gates.collectives import Group, all_reduce, all_to_all, num_ranks
from recsys.metrics.auc import auc
from recsys.metrics.grouped_auc import GroupedAUC, user_auc
from recsys.metrics.inputs import Measured

MIX = 0x5851F42D4C957F2D  # odd: users that differ by a multiple of the ranks are spread


def rank_of_user(users: Tensor, ranks: int) -> Tensor:
    """Return the rank (N,) that all rows of a user are sent to.

    Args:
        users: (N,) int64.
        ranks: Number of ranks.
    """
    mixed = users * MIX
    return (mixed ^ (mixed >> 32)) % ranks


def routed_by_user(users: Tensor, *columns: Tensor, group: Group = None) -> list[Tensor]:
    """Return the users and columns of the rows that belong to this rank; all ranks must call.

    Args:
        users: (N,) user of each row of this rank, int64.
        columns: (N, ...) what is sent with them, of the same dtypes on all ranks.
        group: Process group.

    Returns:
        The users (M,) of this rank's rows, then each column (M, ...).
    """
    ranks = num_ranks(group)
    if ranks == 1:
        return [users, *columns]
    target = rank_of_user(users, ranks)
    order = target.argsort(stable=True)
    sent = target.bincount(minlength=ranks)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    numbers = sent.tolist(), received.tolist()
    return [all_to_all(column[order], *numbers, group) for column in (users, *columns)]


def sharded_gauc(
    scores: Tensor,
    labels: Tensor,
    users: Tensor,
    weights: Tensor | None = None,
    *,
    group: Group = None,
) -> GroupedAUC:
    """Return the grouped AUC of the rows of all ranks, equal to that of one process.

    A mean of the ranks' values would be another figure: users would be split. Every rank must
    call, also one without rows.

    Args:
        scores: (N,) of this rank.
        labels: (N,), 0 or 1.
        users: (N,), int64, the same numbers on all ranks.
        weights: (N,) sample weights; 1 by default.
        group: Process group.

    Raises:
        GatesError: A score is NaN, or a label is neither 0 nor 1.
    """
    given = torch.ones_like(scores, dtype=torch.float64) if weights is None else weights.double()
    rows = routed_by_user(users, scores.double(), labels.double(), given, group=group)
    owner, *columns = (column.cpu().numpy() for column in rows)
    areas, weight = user_auc(columns[0], columns[1], owner, columns[2])[1:]
    known = areas == areas
    sums = [
        (areas[known] * weight[known]).sum(), weight[known].sum(), areas[known].sum(),
        known.sum(), (~known).sum(),
    ]  # fmt: skip
    total = torch.tensor([float(one) for one in sums], dtype=torch.float64, device=scores.device)
    if num_ranks(group) > 1:
        total = all_reduce(total, group)
    weighted, mass, plain, count, excluded = total.tolist()
    if not count:
        reason = "no user has both classes"
        return GroupedAUC(float("nan"), float("nan"), 0, int(excluded), reason)
    return GroupedAUC(weighted / mass, plain / count, int(count), int(excluded))


def gathered_auc(
    scores: Tensor, labels: Tensor, weights: Tensor | None = None, *, group: Group = None
) -> Measured:
    """Return the exact AUC of the rows of all ranks; every rank holds all rows meanwhile.

    Where they do not fit, :class:`~recsys.metrics.histogram_auc.HistogramAUC` adds up counts.

    Args:
        scores: (N,) of this rank.
        labels: (N,), 0 or 1.
        weights: (N,) sample weights; 1 by default.
        group: Process group.

    Raises:
        GatesError: A score is NaN, or a label is neither 0 nor 1.
    """
    given = torch.ones_like(scores, dtype=torch.float64) if weights is None else weights.double()
    rows = gathered_rows(torch.stack((scores.double(), labels.double(), given), 1), group)
    return auc(*rows.cpu().numpy().T)


def gathered_rows(rows: Tensor, group: Group = None) -> Tensor:
    """Return the rows (N, ...) of all ranks, in the order of the ranks; every rank must call."""
    ranks = num_ranks(group)
    if ranks == 1:
        return rows
    own = torch.tensor([len(rows)], device=rows.device)
    lengths = [torch.empty_like(own) for _ in range(ranks)]
    dist.all_gather(lengths, own, group=group)
    counts = [int(length) for length in lengths]
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    found = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(found, padded, group=group)
    return torch.cat([part[:count] for part, count in zip(found, counts, strict=True)])
