"""What a network must beat: base rates, one column, biases, factorization, boosted trees."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor, nn

from core_gates.errors import check_at_least, check_positive
from recsys.inputs import Batch
from recsys.regression import LogNormalHeads
from recsys.validation import intercepts_of, task_sums

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression


class Predictor(Protocol):
    """A baseline: it sees the encoded rows that networks see, and nothing else."""

    def fit(self, rows: Batch, validation: Batch) -> Self:
        """Learn from training rows; a task without both labels there is predicted by its rate.

        Args:
            rows: Training rows.
            validation: Rows by which training may stop, as it does for networks.
        """

    def predict(self, rows: Batch) -> NDArray[np.float64]:
        """Return probabilities (N, T)."""


def rates(rows: Batch) -> NDArray[np.float64]:
    """Return the weighted positive rate (T,) of each task over its rows, smoothed off 0 and 1.

    One half of a positive and of a negative row is added, so that a logarithm exists.
    """
    weight = rows.weight.double().unsqueeze(1) * rows.mask
    positives = (weight * rows.labels).sum(0) + 0.5
    return (positives / (weight.sum(0) + 1)).numpy()


class BaseRates:
    """Predict the rate of each task in the training rows."""

    def fit(self, rows: Batch, validation: Batch) -> Self:  # noqa: ARG002
        """Count."""
        self.rates = rates(rows)
        return self

    def predict(self, rows: Batch) -> NDArray[np.float64]:
        """Return the rates for every row (N, T)."""
        return np.tile(self.rates, (len(rows), 1))


class OneColumn:
    """Predict the rate of each task among training rows with a similar value of one column.

    Rates are those of quantile bins, shrunk towards the rate of all rows.

    Args:
        column: Place of the column among the dense inputs; or a place for each task.
        bins: Number of quantile bins.
        prior: Rows with the overall rate that are added to each bin.

    Raises:
        ValueError: There is no bin, or the prior is not positive.
    """

    def __init__(self, column: int | Sequence[int], *, bins: int = 50, prior: float = 20.0) -> None:
        check_at_least(1, bins=bins)
        check_positive(prior=prior)
        self.column = column if isinstance(column, int) else tuple(column)
        self.bins, self.prior = bins, prior

    def fit(self, rows: Batch, validation: Batch) -> Self:  # noqa: ARG002
        """Count in bins.

        Raises:
            ValueError: There is not one column for each task.
        """
        weight = rows.weight.double().unsqueeze(1).numpy() * rows.mask.numpy()
        positives = weight * rows.labels.double().numpy()
        columns, base = self._columns(rows), rates(rows)
        steps = np.linspace(0, 1, self.bins + 1)[1:-1]
        self.edges, self.tables = [], []
        for task, values in enumerate(columns):
            edges = np.unique(np.quantile(values, steps))
            bins = np.searchsorted(edges, values, side="right")
            counts = np.bincount(bins, weight[:, task], len(edges) + 1)
            sums = np.bincount(bins, positives[:, task], len(edges) + 1)
            self.edges.append(edges)
            self.tables.append((sums + self.prior * base[task]) / (counts + self.prior))
        return self

    def predict(self, rows: Batch) -> NDArray[np.float64]:
        """Return the rates of the bins of the rows (N, T)."""
        columns = [
            table[np.searchsorted(edges, values, side="right")]
            for edges, table, values in zip(
                self.edges, self.tables, self._columns(rows), strict=True
            )
        ]
        return np.stack(columns, 1)

    def _columns(self, rows: Batch) -> list[NDArray[np.float64]]:
        """Return the values (N,) that each task goes by."""
        tasks = rows.labels.shape[1]
        places = (self.column,) * tasks if isinstance(self.column, int) else self.column
        if len(places) != tasks:
            raise ValueError(f"{len(places)} columns for {tasks} tasks, expected one for each")
        return [rows.dense[:, place].double().numpy() for place in places]


class Biases:
    """Predict σ(bias + Σ_columns bias of the value), one logistic regression for each task.

    Args:
        columns: Places of the columns among the sparse inputs.
        sizes: Rows of their tables.
        penalty: Weight of the squared biases, in rows.

    Raises:
        ValueError: The penalty is not positive.
    """

    def __init__(
        self, columns: Sequence[int], sizes: Sequence[int], *, penalty: float = 1.0
    ) -> None:
        check_positive(penalty=penalty)
        self.columns, self.sizes, self.penalty = tuple(columns), tuple(sizes), penalty

    def fit(self, rows: Batch, validation: Batch) -> Self:  # noqa: ARG002
        """Fit each task to the rows where it counts."""
        from sklearn.linear_model import LogisticRegression  # takes a second

        inputs, self.rates = self._one_hot(rows), rates(rows)
        self.models: list[LogisticRegression | None] = []
        for task in range(rows.labels.shape[1]):
            counts = rows.mask[:, task].numpy()
            labels = rows.labels[:, task].numpy()[counts]
            model = None
            if 0 < labels.sum() < len(labels):
                model = LogisticRegression(C=1 / self.penalty, max_iter=300)
                model.fit(inputs[counts], labels, sample_weight=rows.weight.numpy()[counts])
            self.models.append(model)
        return self

    def predict(self, rows: Batch) -> NDArray[np.float64]:
        """Return probabilities (N, T)."""
        return _predicted(self.models, self._one_hot(rows), self.rates)

    def _one_hot(self, rows: Batch) -> sparse.csr_matrix:
        starts = np.concatenate([[0], np.cumsum(self.sizes)])
        places = rows.sparse[:, list(self.columns)].numpy() + starts[:-1]
        count, width = places.shape
        bounds = np.arange(count + 1) * width
        ones = np.ones(count * width)
        return sparse.csr_matrix((ones, places.ravel(), bounds), shape=(count, starts[-1]))


def _predicted(
    models: Sequence[Any], inputs: Any, rates: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return probabilities (N, T): of the model of each task, or its rate where it has none."""
    chances = np.tile(rates, (inputs.shape[0], 1))
    for task, model in enumerate(models):
        if model is not None:
            chances[:, task] = model.predict_proba(inputs)[:, 1]
    return chances


ROWS = 8192


class Factorization:
    """Predict σ(b_t + Σ_columns bias_t(value) + Σ_k W_tk (Σ_user u_k)(Σ_item v_k)).

    The textbook model of users and items (Rendle, 2010), with factors that all tasks share. Dense
    columns enter as a bias of each quantile bin and as themselves. Without columns of users, or of
    items, it is a linear model. It is trained by Adam until the validation loss, summed over tasks,
    no longer falls; its best state is kept.

    Args:
        sizes: Rows of the tables of the F sparse columns.
        user: Places of the columns that describe users.
        item: Places of those that describe items.
        dim: Factors K.
        learning_rate: Of Adam.
        penalty: Weight of the squared factors of the values of a row.
        bias_penalty: That of its squared biases, in units of ``penalty``.
        epochs: Passes at most.
        batch_size: Rows B of a step.
        bins: Quantile bins of a dense column.
        patience: Passes without a better validation loss after which training stops.
        seed: Of factors and of the order of rows.

    Raises:
        ValueError: A number is too small.
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
        bias_penalty: float = 10.0,
        epochs: int = 12,
        batch_size: int = 2048,
        bins: int = 64,
        patience: int = 2,
        seed: int = 0,
    ) -> None:
        check_at_least(1, dim=dim, epochs=epochs, batch_size=batch_size, bins=bins)
        check_at_least(0, penalty=penalty, bias_penalty=bias_penalty, patience=patience, seed=seed)
        check_positive(learning_rate=learning_rate)
        self.sizes, self.user, self.item = tuple(sizes), tuple(user), tuple(item)
        self.dim, self.learning_rate = dim, learning_rate
        self.penalty, self.bias_penalty = penalty, bias_penalty
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
        tasks, count = len(start), max(sum(given.sizes), 1)
        self.user, self.item = list(given.user), list(given.item)
        self.bins, self.bias_penalty = given.bins, given.bias_penalty
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
        """Return logits (B, T) and the penalty of factors and biases of a row, its mean."""
        places = rows.sparse + self.starts
        factors = self.factors(places)
        product = factors[:, self.user].sum(1) * factors[:, self.item].sum(1)
        logits = self.start + self.bias(places) + self.weight(product) + rows.dense @ self.linear
        if bins.shape[1]:
            columns = torch.arange(bins.shape[1]) * self.bins
            logits = logits + self.binned(bins + columns)
        biases = nn.functional.embedding(places, self.bias.weight)
        size = factors.square().sum() + self.bias_penalty * biases.square().sum()
        return logits, size / len(places)


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


CATEGORIES = 255  # that the histograms of the trees can hold


class Trees:
    """Boosted trees of scikit-learn on sparse columns, as categories, and dense columns.

    A column with more values than a histogram holds is given as numbers, in order of frequency.

    Args:
        sparse: Places of the columns among the sparse inputs; all if None.
        learning_rate: Shrinkage.
        max_leaf_nodes: Leaves of a tree.
        max_iter: Trees at most; fewer where the validation loss no longer improves.
        l2: Penalty of leaves.
        seed: Of the features that the bins are drawn from.
        heads: Of a schema whose tasks are thresholds of numbers: the numbers are predicted instead
            of the labels, with the spread that they have about the predictions of validation rows.

    Raises:
        ValueError: A number is too small.
    """

    def __init__(
        self,
        sparse: Sequence[int] | None = None,
        *,
        learning_rate: float = 0.05,
        max_leaf_nodes: int = 31,
        max_iter: int = 1000,
        l2: float = 1.0,
        seed: int = 0,
        heads: LogNormalHeads | None = None,
    ) -> None:
        check_positive(learning_rate=learning_rate)
        check_at_least(1, max_iter=max_iter)
        check_at_least(2, max_leaf_nodes=max_leaf_nodes)
        check_at_least(0, l2=l2, seed=seed)
        self.sparse, self.heads = None if sparse is None else tuple(sparse), heads
        self.options: dict[str, Any] = {
            "learning_rate": learning_rate, "max_leaf_nodes": max_leaf_nodes,
            "max_iter": max_iter, "l2_regularization": l2, "random_state": seed,
            "early_stopping": True, "n_iter_no_change": 15,
        }  # fmt: skip

    def fit(self, rows: Batch, validation: Batch) -> Self:
        """Fit each task to the rows where it counts; validation rows stop it.

        Where a task counts in none of them, a tenth of its training rows stops it instead.
        """
        from sklearn import ensemble  # takes a second

        inputs, held, self.rates = self._inputs(rows), self._inputs(validation), rates(rows)
        width = rows.sparse.shape[1] if self.sparse is None else len(self.sparse)
        categories = [c for c in range(width) if inputs[:, c].max(initial=0) < CATEGORIES]
        (truth, mask), (validation_truth, seen) = self._targets(rows), self._targets(validation)
        kind = "Regressor" if self.heads else "Classifier"
        self.models: list[Any] = []
        for task in range(truth.shape[1]):
            counts, stops = mask[:, task], seen[:, task]
            labels = truth[counts, task]
            model = None
            if self.heads or min(labels.sum(), len(labels) - labels.sum()) >= 10:
                model = getattr(ensemble, f"HistGradientBoosting{kind}")(
                    categorical_features=categories or None, **self.options
                )
                stopping: dict[str, Any] = {}
                if stops.any():
                    stopping = {
                        "X_val": held[stops],
                        "y_val": validation_truth[stops, task],
                        "sample_weight_val": validation.weight.numpy()[stops],
                    }
                weight = rows.weight.numpy()[counts]
                model.fit(inputs[counts], labels, sample_weight=weight, **stopping)
            if self.heads and model:
                gaps = validation_truth[stops, task] - model.predict(held[stops])
                self.heads.spread.data[task] = math.log(gaps.std())
            self.models.append(model)
        return self

    def predict(self, rows: Batch) -> NDArray[np.float64]:
        """Return probabilities (N, T)."""
        inputs = self._inputs(rows)
        if self.heads is None:
            return _predicted(self.models, inputs, self.rates)
        logits = torch.from_numpy(np.stack([model.predict(inputs) for model in self.models], 1))
        return self.heads(logits, rows.dense).detach().double().sigmoid().numpy()

    def _targets(self, rows: Batch) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Return labels (N, T) or numbers (N, R), and where each counts."""
        if self.heads is None:
            return rows.labels.numpy(), rows.mask.numpy()
        assert rows.numbers is not None
        return rows.numbers.numpy(), ~rows.numbers.isnan().numpy()

    def _inputs(self, rows: Batch) -> NDArray[np.float64]:
        sparse = rows.sparse if self.sparse is None else rows.sparse[:, list(self.sparse)]
        inputs: NDArray[np.float64] = np.concatenate([sparse.numpy(), rows.dense.numpy()], 1)
        return inputs


CLOSEST = 1e-12
"""Distance of a probability from 0 and 1 at which its logit is taken."""


class WithIntercepts:
    """Add one number for each task to the logits of a baseline, see `recsys.validation`.

    Args:
        predictor: The baseline, not yet fitted.
    """

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor

    def fit(self, rows: Batch, validation: Batch) -> Self:
        """Fit the baseline, then its intercepts on the validation rows."""
        self.predictor.fit(rows, validation)
        self.intercepts = intercepts_of(
            self._logits(validation), validation.labels, validation.mask, validation.weight
        )
        return self

    def predict(self, rows: Batch) -> NDArray[np.float64]:
        """Return probabilities (N, T)."""
        return (self._logits(rows) + self.intercepts).sigmoid().numpy()

    def _logits(self, rows: Batch) -> torch.Tensor:
        return torch.from_numpy(self.predictor.predict(rows)).double().logit(eps=CLOSEST)


KINDS: dict[str, Callable[..., Predictor]] = {
    "base_rates": BaseRates,
    "one_column": OneColumn,
    "biases": Biases,
    "factorization": Factorization,
    "trees": Trees,
}
"""Baselines by their names in configurations."""
