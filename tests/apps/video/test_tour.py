"""The video stop of the tour, on a small feed; its verdicts, whichever way figures fall."""

import io
import itertools
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from apps.video import tour as module
from apps.video.tour import CGC, DURATION, HOME, MMOE, ORACLE, tour
from harness.evidence import Row
from harness.report.page import Page
from recsys.experiments.claims import HEALTHY

SHOWN = ("scale_ratio", "near_zero_rate_max", "task_gate_weight_max")


class Report:
    def __init__(self, **figures):
        self.figures = figures

    def summary(self):
        return {**dict.fromkeys(HEALTHY, 0.0), **self.figures}


def faults(home, cgc):
    return module._faults(module.Trained(None, {HOME: Report(**home), CGC: Report(**cgc)}, {}))


def rows_of(gaps, p=0.001):
    """Rows of methods whose log-loss is that of HoME, 2, plus a gap with an interval of ± 0.1."""
    found = {(HOME, ""): Row(HOME, "", "log_loss", 2.0, 1.9, 2.1, 50)}
    for method, gap in gaps.items():
        found[method, ""] = Row(method, "", "log_loss", 2.0 + gap)
        found[method, HOME] = Row(method, "", "log_loss", gap, gap - 0.1, gap + 0.1, 50, HOME, p)
    return found


@pytest.fixture(scope="module")
def printed():
    """What the stop prints besides what it says."""
    return io.StringIO()


@pytest.fixture(scope="module")
def stop(tmp_path_factory, printed):
    folder, said = tmp_path_factory.mktemp("tour") / "video", []
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr("harness.runs.terminal.SHORT", 0.01)
        patch.setattr(module, "SHORT", 0.01)
        found = tour(folder, said.append, rows=8_000)
    assert said[0] == "preparing rows of `stress`"
    assert {f"training {m}" for m in (HOME, MMOE, CGC)} <= set(said)
    assert list(folder.iterdir()) == []  # checkpoints are gone
    return found


@pytest.mark.fault("46 neighbors")
def test_a_long_training_is_not_silent(stop, printed):
    shown = re.findall(r"training: (\w+)  (\d of \d)  \d+ s\n", printed.getvalue())
    raw, normalized = [HOME, MMOE, CGC], [HOME, MMOE]
    expected = [
        (m, f"{n} of {len(own)}") for own in (raw, normalized) for n, m in enumerate(own, 1)
    ]
    assert [one for one, _ in itertools.groupby(shown)] == expected


def test_experts_and_accuracy(stop):
    experts, accuracy = stop.rows
    done = stop.done[0].result
    assert re.fullmatch(
        r"of the first 10 videos of a viewer's feed \d+% are watched, of all \d+ \d+%", done
    )
    assert re.fullmatch(r"\d+\.\dx, [1-9]\d?%, \d+%", experts.value)  # some are nearly zero
    plain = re.fullmatch(r"MMoE (.+)x, (\d+)%, \d+%; CGC (.+)x, (\d+)%, \d+%", experts.baseline)
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
        ({"scale_ratio": 2.0}, {"scale_ratio": 30.0}, "healthy; healthy rivals: none"),
        (
            {"scale_ratio": 4.0},
            {"scale_ratio": 2.0},
            "not healthy: one expert's outputs are over 3 times as large as another's; "
            f"healthy rivals: {CGC}",
        ),
        (
            {"near_zero_rate_max": 0.2, "task_gate_weight_max": 0.9},
            {"near_zero_rate_max": 0.2},
            "not healthy: an expert outputs nearly 0 in over 15 % of the cases; "
            "a gate gives over 80 % of its weight to one expert; healthy rivals: none",
        ),
    ],
)
@pytest.mark.fault("46 S1")
def test_all_networks_are_judged_compared_and_shown_by_the_same_figures(home, cgc, verdict):
    row = faults(home, cgc)
    assert row.verdict == verdict
    for method, figures, shown in ((HOME, home, row.value), (CGC, cgc, row.baseline)):
        scale, near, gate = (figures.get(name, 0.0) for name in SHOWN)
        assert shown.removeprefix(f"{method} ") == f"{scale:.1f}x, {near:.0%}, {gate:.0%}"


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
    assert row.verdict == f"{verdict}; {module.ONE_SEED}"


def test_the_evidence_holds_the_verdict_on_many_seeds():
    page = (Path(__file__).parents[3] / "docs/evidence/video.md").read_text()
    (claim,) = re.findall(r"\| HoME is ahead of other networks \|.*", page)
    assert "one seed" in module.ONE_SEED
    assert "level with normalized SharedBottom, MMoE, PLE" in claim


def test_a_large_p_is_no_difference():
    losses = rows_of({MMOE: 0.2, DURATION: 0.3, ORACLE: -0.5}, p=0.2)
    expected = f"not distinguishable from {MMOE} and {DURATION}; {module.ONE_SEED}"
    assert module._accuracy(losses).verdict == expected
