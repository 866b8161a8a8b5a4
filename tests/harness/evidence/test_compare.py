import subprocess
import sys

import numpy as np
import pytest

from harness.evidence import Resamples, Row, compare, holm, moments

COUNT = 60


@pytest.fixture
def scores():
    random = np.random.default_rng(0)
    common = random.normal(size=COUNT)

    def of(shift):
        noise = common + 0.3 * random.normal(size=COUNT) + shift
        return lambda weights: {**moments(noise, name="mean")(weights), "sum": weights.sum(-1)}

    return {"base": [of(0), of(0)], "same": [of(0), of(0)], "more": [of(1), of(1)]}


def test_rows_of_methods_then_of_differences(scores):
    draws = Resamples.clusters(range(COUNT))
    rows = compare(scores, draws, task="test", reference="base")
    names = [(row.method, row.versus, row.metric) for row in rows]
    assert names == [
        *((method, "", metric) for method in scores for metric in ("mean", "sum")),
        *((method, "base", metric) for method in ("same", "more") for metric in ("mean", "sum")),
    ]
    assert all(row.task == "test" and row.n == COUNT for row in rows)
    for row in rows[:6]:
        assert row[3:7] == draws.intervals(scores[row.method])[row.metric]
        assert np.isnan(row.p)
        assert not row.significant
    gaps = {m: draws.differences(scores[m], scores["base"]) for m in ("same", "more")}
    for row in rows[6:]:
        gap = gaps[row.method][row.metric]
        assert row[3:7] == (gap.value, gap.low, gap.high, gap.units)


def test_p_is_corrected_for_the_methods_of_each_metric(scores):
    draws = Resamples.clusters(range(COUNT))
    found = {row[:3]: row.p for row in compare(scores, draws, task="t", reference="base")[6:]}
    raw = [draws.differences(scores[m], scores["base"])["mean"].p for m in ("same", "more")]
    assert [found["same", "t", "mean"], found["more", "t", "mean"]] == holm(raw).tolist()
    assert found["more", "t", "mean"] == pytest.approx(2 * 2 / 2001)
    assert found["same", "t", "sum"] == found["more", "t", "sum"] == 1


def test_significance_needs_the_interval_and_p(scores):
    rows = compare(scores, Resamples.clusters(range(COUNT)), task="t", reference="base")
    assert [row.label for row in rows if row.significant] == ["more − base"]
    apart = Row("a", "t", "m", 1.0, 0.5, 1.5, 9, "b", 0.04)
    assert apart.significant
    assert not apart._replace(p=0.05).significant
    assert not any(apart._replace(low=low).significant for low in (-0.1, 0.0))
    assert not apart._replace(low=float("nan"), high=float("nan")).significant


def test_without_a_reference_nothing_is_subtracted(scores):
    rows = compare(scores, Resamples.clusters(range(COUNT)), task="t")
    assert (len(rows), {row.versus for row in rows}) == (6, {""})


def test_methods_with_other_scores_and_seeds(scores):
    alone = {"fixed": moments(np.zeros(COUNT), name="mean")}
    rows = compare(scores | alone, Resamples.clusters(range(COUNT)), task="t", reference="fixed")
    assert [row.metric for row in rows if row.versus] == ["mean"] * 3


def test_the_reference_must_be_there(scores):
    with pytest.raises(ValueError, match="reference 'none' is none of base, same, more"):
        compare(scores, Resamples.clusters(range(COUNT)), task="t", reference="none")


def test_evidence_needs_numpy_alone():
    code = (
        "import sys, harness.evidence;"
        "print({'torch', 'pandas', 'scipy', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_methods_without_scores_are_left_out():
    draws, scores = Resamples.clusters(range(6)), moments([1.0, 2, 3, 4, 5, 7])
    rows = compare({"a": scores, "b": []}, draws, task="t", reference="b")
    assert [row.label for row in rows] == ["a"]
    rows = compare({"a": [scores], "b": [], "c": scores}, draws, task="t", reference="c")
    assert [row.label for row in rows] == ["a", "c", "a − c"]
