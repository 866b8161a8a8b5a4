"""The honest table: does any kind of gate beat the plain network at the same budget?"""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pandas as pd

from core_gates.errors import GatesError
from endoscopy.evaluation.baselines import REGRESSION
from endoscopy.evaluation.size_evaluation import headline
from endoscopy.evaluation.size_scores import score_differences, score_intervals
from endoscopy.metrics import CONTINUOUS, CutOffs, object_table
from harness.evidence import Row, holm

REFERENCE = "plain"
SCORES = ("macro_f1", "mape")
LOWER_IS_BETTER = ("mape", "mae_mm", "rmse_mm")


class Design(NamedTuple):
    """The columns that identify a training run in a table of predictions."""

    variant: str = "variant"
    objects: str = "train_objects"
    seed: str = "seed"


DESIGN = Design()


def honest_table(
    predictions: pd.DataFrame,
    *,
    reference: str = REFERENCE,
    scores: Sequence[str] = SCORES,
    cut_offs: CutOffs = CONTINUOUS,
    resamples: int = 2000,
) -> pd.DataFrame:
    """Compare every variant with the reference at every number of training objects.

    Differences are paired by test object and by seed: the same test objects and the same seeds for
    all variants of one size. Resamples draw patients and seeds. P-values of one score are
    corrected for all comparisons of the table (Holm, 1979).

    Args:
        predictions: Predictions of frames, or of objects, of all training runs: the columns of
            `object_table` and variant, train_objects, seed.
        reference: The variant to compare with.
        scores: Names of `size_scores`.
        cut_offs: Of the predictions.
        resamples: Number of bootstrap resamples.

    Returns:
        One row per (train_objects, variant, score): seeds, test_objects, value, low, high, and,
        except for the reference, difference, difference_low, difference_high, p_value, p_holm,
        verdict: ``better`` or ``worse`` if the interval excludes zero and p_holm is below 0.05,
        ``better alone`` or ``worse alone`` if only the former holds, else ``no difference``.

    Raises:
        GatesError: A column or the reference is missing, or a variant lacks seeds of the reference.
    """
    if missing := [name for name in DESIGN if name not in predictions]:
        raise GatesError(f"predictions lack {', '.join(missing)}; expected {', '.join(DESIGN)}")
    rows = []
    for size, trained in predictions.groupby(DESIGN.objects, sort=True):
        tables = seed_tables(trained)
        if reference not in tables:
            raise GatesError(f"at {size} objects there is no {reference!r}, only {sorted(tables)}")
        for variant in [reference, *(name for name in tables if name != reference)]:
            ours, theirs = set(tables[variant]), set(tables[reference])
            if ours != theirs:
                raise GatesError(
                    f"at {size} objects {variant} has seeds {sorted(ours)} and {reference}"
                    f" {sorted(theirs)}; run the same seeds of both"
                )
            rows += _rows(tables, variant, reference, sorted(ours), scores, cut_offs, resamples,
                          {DESIGN.objects: size})  # fmt: skip
    return _with_verdicts(pd.DataFrame(rows))


def baseline_table(
    predictions: pd.DataFrame,
    *,
    scores: Sequence[str] = SCORES,
    cut_offs: CutOffs = CONTINUOUS,
    resamples: int = 2000,
) -> pd.DataFrame:
    """Score baselines at every number of training objects.

    Args:
        predictions: As for `honest_table`; with the plain network, which the regression on area
            and brightness is compared with.
        scores: Names of `size_scores`.
        cut_offs: Of the predictions.
        resamples: Number of bootstrap resamples.

    Returns:
        One row per (train_objects, baseline, score): seeds, test_objects, value, low, high; of the
        regression difference, difference_low, difference_high and p_value.
    """
    rows = []
    for size, fitted in predictions.groupby(DESIGN.objects, sort=True):
        tables = seed_tables(fitted)
        common: dict[str, object] = {DESIGN.objects: size}
        for name, by_seed in tables.items():
            if name != REFERENCE:
                versus = REFERENCE if name == REGRESSION and REFERENCE in tables else name
                rows += _rows(
                    tables, name, versus, list(by_seed), scores, cut_offs, resamples, common
                )
    return pd.DataFrame(rows)


def seed_tables(predictions: pd.DataFrame) -> dict[str, dict[int, pd.DataFrame]]:
    """Return the object table of every variant and seed of one number of training objects."""
    return {
        str(variant): {
            int(str(seed)): object_table(seed_rows.drop(columns=list(DESIGN)))
            for seed, seed_rows in group.groupby(DESIGN.seed, sort=True)
        }
        for variant, group in predictions.groupby(DESIGN.variant, sort=False)
    }


def honest_headline(table: pd.DataFrame, *, score: str = "macro_f1") -> str:
    """Summarize what the table of `honest_table` shows for a score, and what it excludes."""
    compared = table[(table["score"] == score) & table["difference"].notna()]
    if compared.empty:
        return "No variant was compared with the plain network."
    clear = compared[compared["verdict"].isin(["better", "worse"])]
    extreme = compared.iloc[int(compared["difference"].abs().argmax())]
    span = (
        f"{extreme['variant']} at {extreme[DESIGN.objects]} objects, {extreme['difference']:+.3f}"
        f" [{extreme['difference_low']:+.3f}, {extreme['difference_high']:+.3f}]"
    )
    seeds = int(compared["seeds"].min())
    others = compared[~compared["verdict"].isin(["better", "worse"])]
    excluded = ""
    if not others.empty:
        reach = float(others[["difference_low", "difference_high"]].abs().to_numpy().max())
        rest = "all intervals" if clear.empty else "the intervals of the others"
        excluded = f" Differences beyond ±{reach:.3f} are outside {rest}."
    if clear.empty:
        return (
            f"No variant differs significantly from the plain network in {score} at any of"
            f" {compared[DESIGN.objects].nunique()} data sizes ({len(compared)} comparisons,"
            f" {seeds} seeds, Holm-corrected); the largest difference is {span}.{excluded}"
        )
    named = "; ".join(
        f"{row['variant']} {row['verdict']} at {row[DESIGN.objects]} objects"
        f" ({row['difference']:+.3f} [{row['difference_low']:+.3f}, {row['difference_high']:+.3f}])"
        for _, row in clear.iterrows()
    )
    return (
        f"{len(clear)} of {len(compared)} comparisons with the plain network differ significantly"
        f" in {score} ({seeds} seeds, Holm-corrected): {named}.{excluded}"
    )


class HonestComparison:
    """The honest table with its baselines, as figures and a first line.

    Args:
        predictions: As for `honest_table`.
        baselines: As for `baseline_table`: ``constant``, ``area`` and perhaps the regression
            on area and brightness.
        cut_offs: Of the predictions.
        resamples: Number of bootstrap resamples.
    """

    def __init__(
        self,
        predictions: pd.DataFrame,
        baselines: pd.DataFrame,
        cut_offs: CutOffs = CONTINUOUS,
        resamples: int = 2000,
    ) -> None:
        self.predictions, self.baselines = predictions, baselines
        self.cut_offs, self.resamples = cut_offs, resamples

    @cached_property
    def table(self) -> pd.DataFrame:
        """The comparison, see `honest_table`."""
        return honest_table(self.predictions, cut_offs=self.cut_offs, resamples=self.resamples)

    @cached_property
    def headline(self) -> str:
        """What is reached without a network and by the plain one; what the table shows."""
        scored = pd.concat([self.baselines, self.predictions])
        size = scored[DESIGN.objects].max()
        tables = seed_tables(scored[scored[DESIGN.objects] == size])
        plain, constant, area = (list(tables[n].values()) for n in (REFERENCE, "constant", "area"))
        regression = list(tables[REGRESSION].values()) if REGRESSION in tables else None
        first = headline(
            plain, constant, area, regression=regression, name="plain network",
            cut_offs=self.cut_offs, resamples=self.resamples,
        )  # fmt: skip
        return f"With {size} training objects, {first} {honest_headline(self.table)}"

    def rows(self) -> list[Row]:
        """Return scores of baselines and networks, and differences from the plain network."""
        rows = []
        plain = self.predictions[self.predictions[DESIGN.variant] == REFERENCE]
        baselines = baseline_table(
            pd.concat([self.baselines, plain]), cut_offs=self.cut_offs, resamples=self.resamples
        ).rename(columns={"p_value": "p_holm"})  # one comparison, which needs no correction
        for _, table_row in pd.concat([baselines, self.table]).iterrows():
            task, units = f"{table_row[DESIGN.objects]} objects", int(table_row["test_objects"])
            value = (table_row["value"], table_row["low"], table_row["high"])
            rows.append(Row(table_row["variant"], task, table_row["score"], *value, n=units))
            if np.isfinite(table_row["difference"]):
                gap = (
                    table_row["difference"],
                    table_row["difference_low"],
                    table_row["difference_high"],
                )
                named = (table_row["variant"], task, table_row["score"])
                rows.append(Row(*named, *gap, units, REFERENCE, table_row["p_holm"]))
        return rows


def _rows(
    tables: dict[str, dict[int, pd.DataFrame]],
    variant: str,
    reference: str,
    seeds: list[int],
    scores: Sequence[str],
    cut_offs: CutOffs,
    resamples: int,
    common: dict[str, object],
) -> list[dict[str, object]]:
    ours = [tables[variant][seed] for seed in seeds]
    values = score_intervals(ours, cut_offs, only=scores, resamples=resamples)
    differences = {}
    if variant != reference:
        theirs = [tables[reference][seed] for seed in seeds]
        differences = score_differences(ours, theirs, cut_offs, only=scores, resamples=resamples)
    rows = []
    for score in scores:
        value, low, high, _ = values[score]
        row = common | {
            "variant": variant, "score": score, "seeds": len(seeds), "test_objects": len(ours[0]),
            "value": value, "low": low, "high": high,
        }  # fmt: skip
        if score in differences:
            gap = differences[score]
            row |= {"difference": gap.value, "difference_low": gap.low,
                    "difference_high": gap.high, "p_value": gap.p}  # fmt: skip
        rows.append(row)
    return rows


def _with_verdicts(table: pd.DataFrame) -> pd.DataFrame:
    table = table.reindex(columns=[*table.columns.difference(["p_value"], sort=False), "p_value"])
    if "difference" not in table:
        table[["difference", "difference_low", "difference_high"]] = float("nan")
    table["p_holm"] = table.groupby("score")["p_value"].transform(holm)
    excludes = (table["difference_low"] > 0) | (table["difference_high"] < 0)
    gain = table["difference"] > 0
    gain ^= table["score"].isin(LOWER_IS_BETTER)
    verdict = gain.map({True: "better", False: "worse"})
    verdict = verdict.where(table["p_holm"] < 0.05, verdict + " alone")
    verdict = verdict.where(excludes, "no difference")
    table["verdict"] = verdict.where(table["difference"].notna(), "")
    return table
