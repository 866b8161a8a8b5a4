"""What the planted features say: intervals over seeds, and one sentence."""

import numpy as np
import pandas as pd
from scipy import stats

CHANCE = 0.5
COLUMNS = ("ranking_auc", "product_auc", "r2", "open_informative", "open_rest")
REFERENCE = "no gates"


def planted_features_table(rows: pd.DataFrame, *, level: float = 0.95) -> pd.DataFrame:
    """Average over seeds, with intervals of Student's t.

    Args:
        rows: Of :func:`planted_features_study`.
        level: Coverage of intervals.

    Returns:
        One row a method: method, seeds, each score with ``_low`` and ``_high``; ``gain`` with
        ``gain_low`` and ``gain_high``: ranking_auc minus that of the weights of the network
        without gates, paired by seed; and the verdict on selection:

        - ``refuted``: the interval of the ranking AUC holds 0.5, or the ranking is not better than
          that by the weights of the network without gates, or most of the other gates stay open;
        - ``shown``: none of these.
    """
    wide = rows.pivot(index="seed", columns="method")
    result = []
    for method in rows["method"].drop_duplicates():
        row: dict[str, object] = {"method": method, "seeds": len(wide)}
        for score in COLUMNS:
            row |= _named(score, _interval(wide[score][method].to_numpy(), level))
        if REFERENCE in wide["ranking_auc"] and method != REFERENCE:
            gains = (wide["ranking_auc"][method] - wide["ranking_auc"][REFERENCE]).to_numpy()
            row |= _named("gain", _interval(gains, level))
            ranks = row["ranking_auc_low"] > CHANCE and row["gain_low"] > 0  # type: ignore[operator]
            closes = row["open_rest_high"] < 0.5  # type: ignore[operator]
            row["selection"] = "shown" if ranks and closes else "refuted"
        result.append(row)
    return pd.DataFrame(result)


def planted_features_headline(table: pd.DataFrame) -> str:
    """Say in one sentence which methods select the planted features."""
    compared = table[table["method"] != REFERENCE]
    parts = [
        f"{row['method']} {row['selection']} (ranking AUC {row['ranking_auc']:.2f}"
        f" [{row['ranking_auc_low']:.2f}, {row['ranking_auc_high']:.2f}],"
        f" {row['open_rest']:.0%} of the other inputs open)"
        for _, row in compared.iterrows()
    ]
    plain = table.loc[table["method"] == REFERENCE, "ranking_auc"]
    base = f"; the weights of a network without gates rank at {plain.iloc[0]:.2f}"
    return f"Selection of planted features: {'; '.join(parts)}{base if len(plain) else ''}."


def _interval(values: np.ndarray, level: float) -> tuple[float, float, float]:
    mean = float(np.mean(values))
    if len(values) < 2 or not np.isfinite(values).all():
        return mean, float("nan"), float("nan")
    error = float(np.std(values, ddof=1)) / len(values) ** 0.5
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * error
    return mean, mean - half, mean + half


def _named(name: str, values: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))
