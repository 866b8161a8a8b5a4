import numpy as np
import pytest
import torch

from recsys.metrics import HistogramAUC, auc, gathered_auc, gauc, routed_by_user, sharded_gauc
from recsys.metrics.sharded import rank_of_user


def rows(n=5001):
    """Rows of many users on every rank; the last rank holds few."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(n, generator=generator).mul(10).round() / 10
    labels = (torch.rand(n, generator=generator) < 0.3).float()
    users = torch.randint(-300, 300, (n,), generator=generator)
    return scores, labels, users, torch.rand(n, generator=generator)


def own(columns, shares):
    """The rows of this rank."""
    rank = torch.distributed.get_rank()
    return [column.split(shares)[rank] for column in columns]


def on_ranks(columns, shares):
    scores, labels, users, weights = own(columns, shares)
    routed = routed_by_user(users, scores, weights)
    histogram = HistogramAUC(128)
    histogram.update(scores.sigmoid(), labels, weights)
    histogram.all_reduce()
    return {
        "histogram": list(histogram.compute()[:2]),
        "plain": list(sharded_gauc(scores, labels, users)[:4]),
        "weighted": list(sharded_gauc(scores, labels, users, weights)[:4]),
        "auc": gathered_auc(scores, labels, weights).value,
        "single": sharded_gauc(scores, torch.zeros_like(labels), users).reason,
        "users": routed[0].unique(),
        "sums": torch.stack([column.double().sum() for column in routed]),
    }


@pytest.mark.parametrize("shares", [[5001, 0], [17, 4000, 984]])
def test_ranks_equal_one_process(ranks, shares):
    columns = rows()
    scores, labels, users, weights = columns
    alone = HistogramAUC(128)
    alone.update(scores.sigmoid(), labels, weights)
    found = ranks(on_ranks, columns, shares, world_size=len(shares))
    for rank in found:
        assert rank["plain"] == pytest.approx(list(gauc(scores, labels, users)[:4]), abs=1e-12)
        expected = gauc(scores, labels, users, weights)
        assert rank["weighted"] == pytest.approx(list(expected[:4]), abs=1e-12)
        assert rank["histogram"] == pytest.approx(alone.compute()[:2], abs=1e-12)
        assert rank["auc"] == pytest.approx(auc(scores, labels, weights).value, abs=1e-12)
        assert rank["single"] == "no user has both classes"
    seen = torch.cat([rank["users"] for rank in found])
    assert len(seen) == len(seen.unique()) == len(users.unique())
    total = sum(rank["sums"] for rank in found)
    expected = [column.double().sum() for column in (users, scores, weights)]
    torch.testing.assert_close(total, torch.stack(expected))


def test_one_process_routes_nothing():
    scores, labels, users, weights = rows(100)
    assert routed_by_user(users, scores)[1] is scores
    found = sharded_gauc(scores, labels, users, weights)
    assert found == pytest.approx(gauc(scores, labels, users, weights), abs=1e-12)


@pytest.mark.parametrize("stride", [1, 2, 64, 1000])
def test_users_are_spread_whatever_their_numbers(stride):
    counts = np.bincount(rank_of_user(torch.arange(4000) * stride, 4), minlength=4)
    assert counts.min() > 700
