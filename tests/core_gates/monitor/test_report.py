import json

import torch

from core_gates import GateMonitor, SoftmaxGate, TopKGate
from core_gates.monitor.hooks import GateReport


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
