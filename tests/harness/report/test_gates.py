import json

import pytest
import torch
from torch import nn

from core_gates import GateMonitor, GatesError, TopKGate
from harness.report.page import Page
from harness.report.sections import (
    FILE,
    coactivation_figure,
    gate_section,
    histogram_figure,
    load_figure,
    save_gates,
)


class Valve(nn.Module):
    def forward(self, x):
        return x * self.gate_values(x)

    def gate_values(self, x):
        return x.sigmoid()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.ModuleDict({"router": TopKGate(4, 6), "valve": Valve(), "experts": nn.ReLU()})


def section(folder):
    page = Page("Run")
    gate_section(page, folder, "What was measured.")
    page.write(folder / "report.html")
    return (folder / "report.html").read_text()


def test_a_section_for_all_kinds_of_gates(tmp_path, model):
    monitor = GateMonitor(model, experts={"experts": 1})
    for _ in range(2):
        with monitor.probing():
            model["router"](torch.ones(3, 4))
    for module in model.values():
        module(torch.randn(50, 4))
    kept = json.loads(save_gates(monitor, tmp_path).read_text())
    assert kept["figures"]["router"] == monitor.compute()["router"]
    html = section(tmp_path)
    assert html.count("<figure>") == 4
    for shown in ("router", "load_cv", "coactivation", "churn", "valve", "closed", "zero_rate_max"):
        assert shown in html


def test_nothing_is_added_without_gates_or_measurements(tmp_path, model):
    assert "What was measured" not in section(tmp_path)
    save_gates(GateMonitor(model), tmp_path)
    assert (tmp_path / FILE).is_file()
    assert "What was measured" not in section(tmp_path)


def test_a_gate_with_one_expert_a_position_has_no_pairs(tmp_path):
    gate = TopKGate(4, 6, k=1)
    monitor = GateMonitor(gate)
    gate(torch.randn(9, 4))
    save_gates(monitor, tmp_path)
    assert section(tmp_path).count("<figure>") == 2


def heights(axis):
    return [bar.get_height() for bar in axis.patches]


def test_what_the_figures_show():
    figure = load_figure({"a": [30.0, 10.0], "b": [0.0, 0.0]})
    assert (heights(figure.axes[0]), figure.axes[0].lines[0].get_ydata()[0]) == ([0.75, 0.25], 0.5)
    assert heights(figure.axes[1]) == [0, 0]
    figure = histogram_figure({str(i): [1.0, 2.0] for i in range(6)})
    assert (heights(figure.axes[5]), len(figure.axes)) == ([1, 2], 6)
    table = coactivation_figure({"a": [[4.0, 1.0], [1.0, 2.0]]}).axes[0].images[0].get_array()
    assert table.tolist() == [[1.0, 0.25], [0.5, 1.0]]


def test_damaged_figures_are_named(tmp_path, model):
    content = save_gates(GateMonitor(model), tmp_path).read_bytes()
    for damaged in (content[: len(content) // 2], b"\xff", b"[]", b"null", b'{"figures": 3}'):
        (tmp_path / FILE).write_bytes(damaged)
        with pytest.raises(GatesError, match=r"gates\.json is damaged .*: write the scores again"):
            section(tmp_path)
