"""Can gates select features? 64 inputs of which 8 matter, so that the answer can be checked.

A network with a gate on every input learns a target that depends on the planted inputs alone. If
gates select, their scores rank the planted inputs first and close the others.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
import torch
from scipy import stats
from sklearn.linear_model import LassoCV
from torch import Tensor, nn
from torch.nn import functional as F

from core_gates import FeatureSelectionGate, GradientRouting
from endoscopy.metrics import auroc

Method = Literal["sigmoid, dual", "sigmoid, joint", "L0 hard concrete", "no gates", "lasso"]
METHODS: tuple[Method, ...] = get_args(Method)
CLOSED = 0.1  # a score below which a gate counts as closed


@dataclass(frozen=True)
class PlantedTask:
    """The data and the budget, the same for every method.

    The inputs are standard normal. The target is half linear in the planted inputs, with
    coefficients of random sign and size 0.5 to 1.5, and half products of pairs of them, plus noise.

    Args:
        num_features: Inputs d.
        num_informative: Planted inputs, even.
        num_train: Training samples.
        num_validation: Samples that choose the strength of every method.
        num_test: Samples of the reported error.
        noise: Standard deviation of the noise, in those of the target without it.
        hidden_dim: Width of the network.
        steps: Optimizer steps.
        batch: Samples a step.
        learning_rate: Of the weights, Adam.
        gate_learning_rates: Of the gates, tried one after the other.
        penalties: Weights of the L0 penalty, divided by d and tried one after the other.
    """

    num_features: int = 64
    num_informative: int = 8
    num_train: int = 400
    num_validation: int = 400
    num_test: int = 2000
    noise: float = 0.5
    hidden_dim: int = 64
    steps: int = 600
    batch: int = 64
    learning_rate: float = 2e-3
    gate_learning_rates: tuple[float, ...] = (2e-3, 1e-2, 5e-2)
    penalties: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)


class PlantedData(NamedTuple):
    """Standardized inputs (N, d), targets (N,) of three parts, and which inputs matter (d,)."""

    inputs: dict[str, Tensor]
    targets: dict[str, Tensor]
    informative: np.ndarray


def planted_features_study(
    seeds: Iterable[int] = range(10),
    *,
    task: PlantedTask | None = None,
    methods: Sequence[Method] = METHODS,
) -> pd.DataFrame:
    """Run every method on a separate data set for each seed.

    Strengths (learning rate of the gates, L0 penalty, lasso) are chosen on the validation samples.
    What ranks the inputs: the scores of the gates, alone and times the norm of their weights; those
    norms alone where there are no gates; the absolute coefficients of the lasso.

    Args:
        seeds: Of data, weights and batches.
        task: Data and budget; the default is the published study.
        methods: Which to run.

    Returns:
        One row a (method, seed): strength, ranking_auc, product_auc (scores times norms),
        open_informative and open_rest (fractions of scores above 0.1), score_informative and
        score_rest (means), r2 on the test samples.
    """
    task = task or PlantedTask()
    rows = []
    for seed in seeds:
        data = planted_data(task, seed)
        rows += [{"method": method, "seed": seed, **_run(method, task, data, seed)}
                 for method in methods]  # fmt: skip
    return pd.DataFrame(rows)


def planted_data(task: PlantedTask, seed: int) -> PlantedData:
    """Draw the data of a seed."""
    draws = np.random.default_rng(seed)
    informative = np.zeros(task.num_features, dtype=bool)
    chosen = draws.permutation(task.num_features)[: task.num_informative]
    informative[chosen] = True
    weights = draws.choice([-1, 1], len(chosen)) * draws.uniform(0.5, 1.5, len(chosen))
    pair_weights = draws.choice([-1, 1], len(chosen) // 2) * draws.uniform(
        0.5, 1.5, len(chosen) // 2
    )
    sizes = {"train": task.num_train, "validation": task.num_validation, "test": task.num_test}
    inputs, targets = {}, {}
    for part, size in sizes.items():
        x = draws.normal(size=(size, task.num_features))
        linear = x[:, chosen] @ weights / np.linalg.norm(weights)
        products = x[:, chosen[::2]] * x[:, chosen[1::2]]
        curved = products @ pair_weights / np.linalg.norm(pair_weights)
        y = (linear + curved) / 2**0.5 + task.noise * draws.normal(size=size)
        inputs[part] = torch.from_numpy(x).float()
        targets[part] = torch.from_numpy(y / (1 + task.noise**2) ** 0.5).float()
    return PlantedData(inputs, targets, informative)


def _run(method: Method, task: PlantedTask, data: PlantedData, seed: int) -> dict[str, float]:
    if method == "lasso":
        return _lasso(data, seed)
    if method == "no gates":
        strengths: tuple[float, ...] = (0.0,)
    else:
        penalized = method == "L0 hard concrete"
        strengths = task.penalties if penalized else task.gate_learning_rates
    fits = [(strength, _fit(method, task, data, seed, strength)) for strength in strengths]
    strength, model = min(fits, key=lambda fit: _error(fit[1], data, "validation"))
    gate, first = model[0], model[1]
    assert isinstance(first, nn.Linear)
    norms = first.weight.detach().norm(dim=0)
    scores = gate.scores().detach() if isinstance(gate, FeatureSelectionGate) else norms
    has_gates = method != "no gates"
    return {"strength": strength} | _ranking(
        scores.numpy(),
        (scores * norms if has_gates else norms).numpy(),
        data.informative,
        1 - _error(model, data, "test") / float(data.targets["test"].var()),
        has_gates=has_gates,
    )


def _fit(
    method: Method, task: PlantedTask, data: PlantedData, seed: int, strength: float
) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = nn.Linear(task.num_features, task.hidden_dim)
        last = nn.Linear(task.hidden_dim, 1)
        penalized = method == "L0 hard concrete"
        gate = FeatureSelectionGate(
            task.num_features, rectifier="hard_concrete" if penalized else "sigmoid", init=0.0
        )
        front = nn.Identity() if method == "no gates" else gate
        model = nn.Sequential(front, first, nn.ReLU(), last)
        weights = [*first.parameters(), *last.parameters()]
        optimizer = torch.optim.Adam(weights, lr=task.learning_rate)
        if method == "no gates":
            routing = GradientRouting(optimizer, None, mode="off")
        else:
            rate = task.gate_learning_rates[-1] if penalized else strength
            routing = GradientRouting(
                optimizer,
                torch.optim.Adam(gate.parameters(), lr=rate),
                mode="dual" if method == "sigmoid, dual" else "joint",
            )
        x, y = data.inputs["train"], data.targets["train"]
        for _ in range(task.steps):
            rows = torch.randint(len(x), (task.batch,), generator=generator)

            def loss(m: nn.Module, rows: Tensor = rows) -> Tensor:
                value = F.mse_loss(m(x[rows]).squeeze(1), y[rows])
                return (
                    value + strength / len(gate.logits) * gate.l0_penalty() if penalized else value
                )

            routing.step(model, loss)
    return model.eval()


def _lasso(data: PlantedData, seed: int) -> dict[str, float]:
    fit = LassoCV(cv=5, random_state=seed, max_iter=10_000).fit(
        data.inputs["train"].numpy(), data.targets["train"].numpy()
    )
    size = np.abs(fit.coef_)
    r2 = fit.score(data.inputs["test"].numpy(), data.targets["test"].numpy())
    row = _ranking(size, size, data.informative, float(r2), has_gates=True)
    row["open_informative"] = float((size > 0)[data.informative].mean())
    row["open_rest"] = float((size > 0)[~data.informative].mean())
    return {"strength": float(fit.alpha_)} | row


@torch.no_grad()
def _error(model: nn.Sequential, data: PlantedData, part: str) -> float:
    return float(F.mse_loss(model(data.inputs[part]).squeeze(1), data.targets[part]))


def _ranking(
    scores: np.ndarray,
    products: np.ndarray,
    informative: np.ndarray,
    r2: float,
    *,
    has_gates: bool,
) -> dict[str, float]:
    rest = ~informative
    row = {
        "ranking_auc": float(auroc(scores, informative)),
        "product_auc": float(auroc(products, informative)),
        "r2": r2,
    }
    names = ("open_informative", "open_rest", "score_informative", "score_rest")
    if not has_gates:
        return row | dict.fromkeys(names, float("nan"))
    values = (
        (scores[informative] > CLOSED).mean(), (scores[rest] > CLOSED).mean(),
        scores[informative].mean(), scores[rest].mean(),
    )  # fmt: skip
    return row | dict(zip(names, map(float, values), strict=True))


CHANCE = 0.5
COLUMNS = ("ranking_auc", "product_auc", "r2", "open_informative", "open_rest")
REFERENCE = "no gates"


def planted_features_table(rows: pd.DataFrame, *, level: float = 0.95) -> pd.DataFrame:
    """Average over seeds, with intervals of Student's t.

    Args:
        rows: Of `planted_features_study`.
        level: Coverage of intervals.

    Returns:
        One row per method: method, seeds, each score with ``_low`` and ``_high``; ``gain`` with
        ``gain_low`` and ``gain_high``: ranking_auc minus that of the weights of the network
        without gates, paired by seed; and ``selection``, whose verdicts hold with the whole
        interval: ``shown`` if the scores rank better than chance, most planted inputs stay open
        and most others close; ``ranks only`` if they rank better than chance; else ``refuted``.
    """
    wide = rows.pivot(index="seed", columns="method")
    result = []
    for method in rows["method"].drop_duplicates():
        row: dict[str, Any] = {"method": method, "seeds": len(wide)}
        for score in COLUMNS:
            values = _interval(wide[score][method].to_numpy(), level)
            bounds = (-np.inf, np.inf) if score == "r2" else (0, 1)
            row |= _named(score, tuple(np.clip(values, *bounds).tolist()))
        if method != REFERENCE:
            row["selection"] = _verdict(row)
            if REFERENCE in wide["ranking_auc"]:
                gains = wide["ranking_auc"][method] - wide["ranking_auc"][REFERENCE]
                row |= _named("gain", _interval(gains.to_numpy(), level))
        result.append(row)
    return pd.DataFrame(result)


def planted_features_headline(table: pd.DataFrame) -> str:
    """Return one sentence on which methods select the planted features."""
    parts = []
    for _, row in table[table["method"] != REFERENCE].iterrows():
        gain = f", {row['gain']:+.2f} against weights without gates" if "gain" in row else ""
        parts.append(
            f"{row['method']} {row['selection']} (ranking AUC {row['ranking_auc']:.2f}"
            f" [{row['ranking_auc_low']:.2f}, {row['ranking_auc_high']:.2f}]{gain},"
            f" {row['open_rest']:.0%} of the other inputs open)"
        )
    return f"Selection of planted features: {'; '.join(parts)}."


def _verdict(row: dict[str, Any]) -> str:
    if not row["ranking_auc_low"] > CHANCE:
        return "refuted"
    selects = row["open_informative_low"] > 0.5 and row["open_rest_high"] < 0.5
    return "shown" if selects else "ranks only"


def _interval(values: np.ndarray, level: float) -> tuple[float, float, float]:
    mean = float(np.mean(values))
    if len(values) < 2 or not np.isfinite(values).all():
        return mean, float("nan"), float("nan")
    error = float(np.std(values, ddof=1)) / len(values) ** 0.5
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * error
    return mean, mean - half, mean + half


def _named(name: str, values: tuple[float, ...]) -> dict[str, float]:
    return dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))
