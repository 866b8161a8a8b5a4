"""A factorization machine: biases of all values, and one product of user and item factors.

B rows, F sparse columns, N dense columns, T tasks, K factors.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from core_gates.errors import check_at_least, check_positive
from recsys.baselines.predictor import rates
from recsys.batch import Batch
from recsys.losses import task_sums

ROWS = 8192


class Factorization:
    """Predict σ(b_t + Σ_columns bias_t(value) + Σ_k W_tk (Σ_user u_k)(Σ_item v_k)).

    The textbook model of users and items (Rendle, 2010), with factors that all tasks share. Dense
    columns enter as a bias of each quantile bin and as themselves. It is trained by Adam until the
    validation loss, summed over tasks, no longer falls; its best state is kept.

    Args:
        sizes: Rows of the tables of the F sparse columns.
        user: Places of the columns that describe users.
        item: Places of those that describe items.
        dim: Factors K.
        learning_rate: Of Adam.
        penalty: Weight of the squared factors of the values of a row; ten times that for biases.
        epochs: Passes at most.
        batch_size: Rows B of a step.
        bins: Quantile bins of a dense column.
        patience: Passes without a better validation loss after which training stops.
        seed: Of factors and of the order of rows.

    Raises:
        ValueError: No column describes users, or none items; a number is too small.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        user: Sequence[int],
        item: Sequence[int],
        *,
        dim: int = 8,
        learning_rate: float = 0.01,
        penalty: float = 1e-4,
        epochs: int = 12,
        batch_size: int = 2048,
        bins: int = 64,
        patience: int = 2,
        seed: int = 0,
    ) -> None:
        if not user or not item:
            raise ValueError("the schema needs a sparse column of users and one of items")
        check_at_least(1, dim=dim, epochs=epochs, batch_size=batch_size, bins=bins)
        check_at_least(0, penalty=penalty, patience=patience, seed=seed)
        check_positive(learning_rate=learning_rate)
        self.sizes, self.user, self.item = tuple(sizes), tuple(user), tuple(item)
        self.dim, self.learning_rate, self.penalty = dim, learning_rate, penalty
        self.epochs, self.batch_size, self.bins = epochs, batch_size, bins
        self.patience, self.seed = patience, seed

    def fit(self, rows: Batch, validation: Batch) -> Self:
        """Fit all tasks together."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.edges = _edges(rows.dense, self.bins)
            logit = torch.from_numpy(rates(rows)).logit().float()
            self.net = _Net(self, logit, rows.dense.shape[1])
            optimizer = torch.optim.Adam(self.net.parameters(), lr=self.learning_rate)
            best, kept, waited = float("inf"), copy.deepcopy(self.net.state_dict()), 0
            for _ in range(self.epochs):
                self._epoch(rows, optimizer)
                loss = float(_loss(self._logits(validation), validation))
                if loss < best:
                    best, kept, waited = loss, copy.deepcopy(self.net.state_dict()), 0
                else:
                    waited += 1
                if waited == self.patience:
                    break
            self.net.load_state_dict(kept)
        return self

    def predict(self, rows: Batch) -> NDArray[np.float64]:
        """Return probabilities (N, T)."""
        return cast(NDArray[np.float64], self._logits(rows).double().sigmoid().numpy())

    def _epoch(self, rows: Batch, optimizer: torch.optim.Optimizer) -> None:
        for chosen in torch.randperm(len(rows)).split(self.batch_size):
            batch = rows.take(chosen)
            logits, size = self.net(batch, self._bins(batch))
            optimizer.zero_grad()
            (_loss(logits, batch) + self.penalty * size).backward()
            optimizer.step()

    @torch.no_grad()
    def _logits(self, rows: Batch) -> Tensor:
        parts = [rows.take(slice(k, k + ROWS)) for k in range(0, len(rows), ROWS)]
        return torch.cat([self.net(part, self._bins(part))[0] for part in parts])

    def _bins(self, rows: Batch) -> Tensor:
        columns = [
            torch.bucketize(column.contiguous(), edges)
            for column, edges in zip(rows.dense.T, self.edges, strict=True)
        ]
        shape = len(rows), 0
        return torch.stack(columns, 1) if columns else torch.zeros(shape, dtype=torch.int64)


class _Net(nn.Module):
    def __init__(self, given: Factorization, start: Tensor, dense: int) -> None:
        super().__init__()
        tasks, count = len(start), sum(given.sizes)
        self.user, self.item = list(given.user), list(given.item)
        self.bins = given.bins
        self.bias = nn.EmbeddingBag(count, tasks, mode="sum")
        self.binned = nn.EmbeddingBag(max(dense * given.bins, 1), tasks, mode="sum")
        self.factors = nn.Embedding(count, given.dim)
        self.weight = nn.Linear(given.dim, tasks)
        self.linear = nn.Parameter(torch.zeros(dense, tasks))
        for zero in (self.bias.weight, self.binned.weight):
            nn.init.zeros_(zero)
        nn.init.normal_(self.factors.weight, std=0.1)
        nn.init.zeros_(self.weight.bias)
        starts = np.concatenate([[0], np.cumsum(given.sizes)[:-1]])
        self.register_buffer("starts", torch.from_numpy(starts).long())
        self.register_buffer("start", start)
        self.starts: Tensor
        self.start: Tensor

    def forward(self, rows: Batch, bins: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (B, T) and the squares of factors and biases of a row, their mean."""
        places = rows.sparse + self.starts
        factors = self.factors(places)
        product = factors[:, self.user].sum(1) * factors[:, self.item].sum(1)
        logits = self.start + self.bias(places) + self.weight(product) + rows.dense @ self.linear
        if bins.shape[1]:
            columns = torch.arange(bins.shape[1]) * self.bins
            logits = logits + self.binned(bins + columns)
        biases = nn.functional.embedding(places, self.bias.weight)
        return logits, (factors.square().sum() + 10 * biases.square().sum()) / len(places)


def _edges(dense: Tensor, bins: int) -> list[Tensor]:
    """Return the distinct inner quantiles of each column."""
    steps = np.linspace(0, 1, bins + 1)[1:-1]
    return [
        torch.from_numpy(np.unique(np.quantile(column.numpy(), steps))).float()
        for column in dense.T
    ]


def _loss(logits: Tensor, rows: Batch) -> Tensor:
    """Return the sum over tasks of the mean cross-entropy where each counts."""
    sums = task_sums(logits, rows.labels, rows.mask, rows.weight)
    return (sums.losses / sums.weights.clamp(min=1e-9)).sum()
