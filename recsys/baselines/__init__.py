"""What a network must beat: base rates, one column, biases, factorization, boosted trees."""

from collections.abc import Callable

from recsys.baselines.base_rates import BaseRates
from recsys.baselines.biases import Biases
from recsys.baselines.factorization import Factorization
from recsys.baselines.one_column import OneColumn
from recsys.baselines.predictor import Predictor
from recsys.baselines.trees import Trees
from recsys.baselines.with_intercepts import WithIntercepts

__all__ = [
    "KINDS",
    "BaseRates",
    "Biases",
    "Factorization",
    "OneColumn",
    "Predictor",
    "Trees",
    "WithIntercepts",
]

KINDS: dict[str, Callable[..., Predictor]] = {
    "base_rates": BaseRates,
    "one_column": OneColumn,
    "biases": Biases,
    "factorization": Factorization,
    "trees": Trees,
}
"""Baselines by their names in configurations."""
