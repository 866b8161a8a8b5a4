"""What the planted features say: intervals over seeds, and one sentence."""

from typing import Any

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
