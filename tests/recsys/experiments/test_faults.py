"""Faults of experts as rows and bars."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from harness.evidence import Row
from recsys.diagnosis.expert_report import ExpertReport
from recsys.diagnosis.layer_report import LayerReport
from recsys.experiments.faults import COLLAPSED, HEALTHY, fault_bars, fault_rows, report_of
from recsys.ranker import Ranker
from recsys.schema import FeatureSchema, Sparse, Task

TASKS = ("view", "like")
E = 3


def report(zero_rate=0.0, std=(1.0, 1.0, 1.0), near=0.05, gate=0.5):
    """A layer of an own expert for each task and a shared one."""
    weights = np.array([[gate, 0, 1 - gate], [0, 1 - gate, gate]])
    layer = LayerReport(
        "layer 1", TASKS, ("view 0", "like 0", "shared 0"), ("view", "like", "shared"), TASKS,
        zero_rate=np.array([zero_rate, 0, 0]), near_zero_rate=np.array([near, 0, 0]),
        mean=np.zeros(E), std=np.array(std), effective_rank=np.ones(E), weights=weights,
        visible=weights > 0, row_entropy=np.zeros(2),
    )  # fmt: skip
    return ExpertReport((layer,), TASKS, (50, 5), 100)


COLLAPSE = {"zero_rate": 0.8, "std": (1.0, 30.0, 2.0)}


def bars_of(collapsed=(), healthy=()):
    reports = {"cgc": list(collapsed), "home": list(healthy)}
    rows = fault_rows({m: own for m, own in reports.items() if own})
    return {
        bar.name: bar
        for bar in fault_bars(rows, ["cgc"] if collapsed else [], ["home"] if healthy else [])
    }


def test_rows_are_medians_and_ranges_over_seeds():
    seeds = [report(gate=gate) for gate in (0.6, 0.9, 0.65)]
    rows = fault_rows({"home": seeds, "single": [ExpertReport((), TASKS, (50, 5), 100)]})
    assert {row.method for row in rows} == {"home"}
    found = {row.metric: row for row in rows}
    weight = found["task_gate_weight_max"]
    assert (weight.value, weight.low, weight.high, weight.n) == (0.65, 0.6, 0.9, 3)
    assert found["scale_ratio"].value == 1
    assert {row.task for row in rows} == {"experts"}


def test_collapse_is_shown_by_every_seed():
    met = bars_of(collapsed=[report(**COLLAPSE), report(zero_rate=0.9, std=(1.0, 21.0, 2.0))])
    assert len(met) == len(COLLAPSED) == 2
    assert all(bar.met for bar in met.values())
    once = bars_of(collapsed=[report(**COLLAPSE), report()])
    assert not any(bar.met for bar in once.values())
    constant = bars_of(collapsed=[report(zero_rate=1.0, std=(0.0, 1.0, 1.0))])
    assert all(bar.met and math.isfinite(bar.value) for bar in constant.values())


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({}, set()),
        ({"std": (1.0, 3.5, 1.0)}, {"scale_ratio"}),
        ({"near": 0.2}, {"near_zero_rate_max"}),
        ({"gate": 0.85}, {"task_gate_weight_max"}),
        (COLLAPSE, {"scale_ratio"}),
    ],
)
def test_health_is_lost_by_a_single_seed(change, missed):
    found = bars_of(healthy=[report(), report(**change), report()])
    assert len(found) == len(HEALTHY) == 3
    assert {name.split(" of ")[0] for name, bar in found.items() if not bar.met} == missed


def test_what_was_not_measured_is_missed():
    """Networks without experts, or an evaluation without ``experts``, show no health."""
    plain = fault_rows({"home": [ExpertReport((), TASKS, (50, 5), 100)]})
    found = fault_bars(plain, ["cgc"], ["home"])
    assert len(found) == 5
    assert all(math.isnan(bar.value) and not bar.met for bar in found)
    some = fault_bars([Row("home", "experts", "scale_ratio", 1.0, 1.0, 1.0)], [], ["home"])
    assert [bar.met for bar in some] == [True, False, False]


def test_the_first_rows_are_measured(rows_of):
    schema = FeatureSchema(tasks=tuple(map(Task, TASKS)), sparse=(Sparse("a"),), dim=3)
    torch.manual_seed(0)
    ranker = Ranker.build(schema, {"a": 9}, 0, "MMoE", {"dim": 4, "num_experts": 3})
    sparse = torch.randint(0, 9, (5000, 1))
    rows = rows_of(torch.randint(0, 2, (5000, 2)), sparse=sparse, dense=torch.zeros(5000, 0))
    found = report_of(ranker, rows)
    assert found.rows == 4096
    assert SimpleNamespace(**found.summary()).scale_ratio >= 1
    assert found.positives == tuple(rows.labels[:4096].sum(0).long().tolist())
