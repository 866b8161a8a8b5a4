import json

import torch

from core_gates import GateMonitor, SoftmaxGate, TopKGate
from core_gates.monitor.hooks import GateReport


def test_table():
    report = GateReport(
        {
            "layers.0.gate": {"tokens": 120.0, "load_cv": 0.123456},
            "valve": {"values": 3.0, "mean": 0.5},
            "b": {"tokens": 7.0, "churn": 1e-5},
        },
        {},
    )
    assert report.table().splitlines() == [
        "| gate          | tokens | load_cv | churn |",
        "| ------------- | -----: | ------: | ----: |",
        "| layers.0.gate |    120 |  0.1235 |       |",
        "| b             |      7 |         | 1e-05 |",
        "",
        "| gate  | values | mean |",
        "| ----- | -----: | ---: |",
        "| valve |      3 |  0.5 |",
    ]
    assert GateReport({}, {}).table() == ""


def test_json_keeps_everything_and_knows_no_nan():
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"top": TopKGate(4, 6), "all": SoftmaxGate(4, 3)})
    monitor = GateMonitor(model, bins=5)
    for gate in model.values():
        gate(torch.randn(9, 4))
    report = monitor.report()
    found = json.loads(report.json())
    assert found["figures"] == report.figures == monitor.compute()
    assert sum(found["distributions"]["top"]["load"]) == 18
    assert len(found["distributions"]["top"]["coactivation"]) == 6
    assert len(found["distributions"]["all"]["histogram"]) == 5
    strange = GateReport({"a": {"x": float("nan"), "y": float("inf")}}, {})
    assert json.loads(strange.json())["figures"] == {"a": {"x": None, "y": None}}
