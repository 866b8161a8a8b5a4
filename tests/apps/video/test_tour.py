"""The video stop of the tour, on a small feed; its verdicts, whichever way figures fall."""

import re

import pytest

from apps.video import tour as module
from apps.video.tour import CGC, DURATION, HOME, MMOE, ORACLE, tour
from harness.evidence import Row
from harness.report.page import Page
from recsys.experiments.claims import HEALTHY


class Report:
    def __init__(self, **figures):
        self.figures = figures

    def summary(self):
        return {**dict.fromkeys(HEALTHY, 0.0), "zero_rate_max": 0.0, **self.figures}


def faults(home, cgc):
    reports = {HOME: Report(**home), CGC: Report(**{"zero_rate_max": 0.8, **cgc})}
    return module._faults(module.Trained(None, reports, {}))


def rows_of(gaps, p=0.001):
    """Rows of methods whose log-loss is that of HoME, 2, plus a gap with an interval of ± 0.1."""
    found = {(HOME, ""): Row(HOME, "", "log_loss", 2.0, 1.9, 2.1, 50)}
    for method, gap in gaps.items():
        found[method, ""] = Row(method, "", "log_loss", 2.0 + gap)
        found[method, HOME] = Row(method, "", "log_loss", gap, gap - 0.1, gap + 0.1, 50, HOME, p)
    return found


@pytest.fixture(scope="module")
def stop(tmp_path_factory):
    folder, said = tmp_path_factory.mktemp("tour") / "video", []
    found = tour(folder, said.append, rows=8_000)
    assert said[0] == "preparing rows of `stress`"
    assert {f"training {m}" for m in (HOME, MMOE, CGC)} <= set(said)
    assert list(folder.iterdir()) == []  # checkpoints are gone
    return found


def test_experts_and_accuracy(stop):
    experts, accuracy = stop.rows
    done = stop.done[0].result
    assert re.fullmatch(
        r"of the first 10 videos of a viewer's feed \d+% are watched, of all \d+ \d+%", done
    )
    assert re.fullmatch(r"\d+\.\dx, 0%", experts.value)  # no Swish is exactly zero
    plain = re.fullmatch(r"MMoE (.+)x, (\d+)%; CGC (.+)x, (\d+)%", experts.baseline)
    assert all(float(plain[k]) > 1 for k in (1, 3))
    assert all(float(plain[k]) > 5 for k in (2, 4))
    value, low, high = map(float, re.findall(r"\d+\.\d+", accuracy.value))
    assert low < value < high
    losses = dict(re.findall(r"([A-Za-z ]+) (\d+\.\d+)", accuracy.baseline.replace(", ", ",")))
    assert list(losses) == [MMOE, DURATION, ORACLE]
    assert float(losses[ORACLE]) < min(value, *(float(losses[m]) for m in (MMOE, DURATION)))


def test_the_page_has_scales_gates_and_losses(stop, tmp_path):
    page = Page("Tour")
    page.section(stop.title)
    stop.draw(page)
    html = page.write(tmp_path / "page.html").read_text()
    assert html.count("data:image/png;base64,") == 5
    for text in (ORACLE, DURATION, "minus HoME", "heavy-tailed"):
        assert text in html


@pytest.mark.parametrize(
    ("home", "cgc", "verdict"),
    [
        ({"scale_ratio": 2.0}, {"scale_ratio": 30.0}, "no collapse"),
        (
            {"scale_ratio": 4.0},
            {"scale_ratio": 9.0},
            "not healthy: one expert's outputs are over 3 times as large as another's",
        ),
        (
            {"scale_ratio": 2.0, "near_zero_rate_max": 0.2, "task_gate_weight_max": 0.9},
            {"scale_ratio": 30.0},
            "not healthy: an expert outputs nearly 0 in over 15 % of the cases; "
            "a gate gives over 80 % of its weight to one expert",
        ),
    ],
)
def test_experts_are_healthy_within_all_bounds(home, cgc, verdict):
    row = faults(home, cgc)
    assert row.verdict == verdict
    assert row.baseline.startswith(f"{CGC} {cgc['scale_ratio']:.1f}x")


@pytest.mark.parametrize(
    ("gaps", "verdict"),
    [
        ((0.2, 0.3), f"better than {MMOE} and {DURATION}"),
        ((0.05, 0.3), f"better than {DURATION}; not distinguishable from {MMOE}"),
        ((-0.2, 0.3), f"better than {DURATION}; worse than {MMOE}"),
        ((-0.2, 0.0), f"not distinguishable from {DURATION}; worse than {MMOE}"),
    ],
)
def test_the_verdict_is_that_of_the_intervals(gaps, verdict):
    row = module._accuracy(rows_of({MMOE: gaps[0], DURATION: gaps[1], ORACLE: -0.5}))
    assert row.verdict == verdict


def test_a_large_p_is_no_difference():
    losses = rows_of({MMOE: 0.2, DURATION: 0.3, ORACLE: -0.5}, p=0.2)
    assert module._accuracy(losses).verdict == f"not distinguishable from {MMOE} and {DURATION}"
