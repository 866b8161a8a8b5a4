import dataclasses

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from benchmarks.comparison import load_head
from benchmarks.run import measure
from benchmarks.weather import convolutions, cycles, stores
from weather.models.held_suarez.model import HeldSuarez
from weather.models.shallow_water.model import ShallowWater


def build(comparison):
    return comparison.build(load_head)


@pytest.fixture
def without_peer(monkeypatch):
    monkeypatch.setattr(cycles, "is_installed", lambda: False)


@pytest.fixture
def short(monkeypatch):
    """Make the gated convolutions and the frames small."""
    monkeypatch.setattr(stores, "FRAME_ROWS", 9)
    monkeypatch.setattr(stores, "FRAME_COLUMNS", 16)
    monkeypatch.setattr(convolutions, "BATCH", 1)
    scales = [(dim, (2, 5, 11), kernel) for dim, _, kernel in convolutions.SCALES]
    monkeypatch.setattr(convolutions, "SCALES", scales)
    return scales


@pytest.mark.slow
@pytest.mark.parametrize("model", [ShallowWater(), HeldSuarez()], ids=["swe", "held_suarez"])
def test_forecasts_are_six_hours_of_twenty_members_or_one(model):
    calls = cycles.forecasts(model)
    assert cycles.DAYS == {"1 member": 0.25, "20 members": 5.0}
    single, batch = calls["1 member"](), calls["20 members"]()
    assert (len(single), len(batch)) == (1, 20)
    assert_close(batch[:1], single, rtol=1e-4, atol=1e-2)
    with torch.no_grad():
        start = model(model.initial_state(1, seed=0), 24.0)
        assert torch.equal(single, model(start, 6.0))
    assert not torch.equal(single, start)


def test_an_absent_peer_is_reported_with_its_remedy(without_peer):
    calls = dict.fromkeys(cycles.DAYS, torch.zeros(9).clone)
    comparison = dataclasses.replace(cycles.held_suarez(), build=lambda load: calls)
    rows = {row["name"].partition(" · ")[2]: row for row in measure(comparison, rounds=2)}
    batch = rows["20 members"]
    assert (batch["baseline"], batch["ratio"], batch["bar"], batch["met"]) == (
        None,
        None,
        1.0,
        None,
    )
    (title,) = [name for name in rows if name.startswith("dinosaur")]
    assert title == "dinosaur, 1 member: dinosaur is not installed: pip install 'gatesuite[bench]'"
    assert rows[title]["value"] is rows[title]["baseline"] is None
    assert rows["1 member, rate"]["unit"] == "member-days/CPU-s"
    expected = 1e3 / rows["1 member"]["value"]
    assert rows["1 member, rate"]["value"] == pytest.approx(expected)


def test_the_peer_relaxes_to_the_temperature_of_held_and_suarez():
    pytest.importorskip("dinosaur", reason=cycles.ABSENT)
    run = cycles.held_suarez_run(12)
    before, after = (np.asarray(run.temperature(s)).mean((-1, -2)) for s in (run.start, run.call()))
    assert_close(before, np.full_like(before, 288.0), rtol=1e-4, atol=0)
    model = HeldSuarez()
    start = torch.zeros(1, 25, 32, 64, dtype=torch.float64)
    start[:, 0] = 1e5
    start[:, 1:9] = 288.0
    ours = (model(start, 6.0)[0, 1:9] - 288.0).mean((-1, -2)).numpy()
    assert np.abs(ours).max() > 0.3
    assert_close(after - before, ours.astype(after.dtype), rtol=0.05, atol=0.01)


def test_analyses_move_the_background_towards_the_observations():
    calls = build(cycles.multiples())
    world = cycles._TwinWorld(load_head)
    seen = world.observations.mask[0]
    values = world.observations.values[0][seen]

    def misfit(states):
        return (states[0].mean(0)[seen] - values).square().mean().item()

    single, ensemble = misfit(world.ensemble[:, :1]), misfit(world.ensemble)
    assert misfit(calls["optimal interpolation"]()) < 0.9 * single
    assert misfit(calls["LETKF of 20"]()) < 0.5 * ensemble
    assert calls["LETKF of 20"]().shape == (1, 20, 3, 32, 64)
    assert calls["Adas"]().shape == (1, 1, 3, 32, 64)
    assert calls["forecast of 20 members"]().shape == (1, 20, 3, 32, 64)


def test_the_cycles_forecast_what_they_analyze():
    world = cycles._TwinWorld(load_head)
    calls = world.cycles("LETKF")
    alone = world.analyses()
    expected = world._forecast(alone["LETKF of 20"]())
    assert_close(calls["LETKF"](), expected)
    assert calls["Adas with its forecast"]().shape == (1, 1, 3, 32, 64)
    assert not torch.equal(calls["Adas"](), calls["Adas with its forecast"]())


def test_layouts_hold_the_same_numbers(short):
    shape = (2, 3, 4, 5, 6)
    x, tokens = convolutions.randn(shape, 0), convolutions.token_layout(shape, 0)
    assert torch.equal(x, tokens)
    assert x.is_contiguous()
    assert tokens.movedim(1, -1).is_contiguous()
    assert not tokens.is_contiguous()


def test_all_convolutions_return_the_same_gradients(short):
    comparisons = [convolutions.conv_backward(), *(convolutions.gated_conv(*s) for s in short)]
    for comparison in comparisons:
        calls = build(comparison)
        expected = calls[comparison.baseline]()
        assert all(grad.abs().sum() > 0 for grad in expected)
        for call in calls.values():
            assert_close(call(), expected, rtol=1e-3, atol=1e-4)


def test_the_eager_gate_is_the_gate(short):
    calls = build(convolutions.silu_gate())
    assert_close(calls["silu_gate"](), calls["eager"]())
    assert calls.keys() == {"eager", "silu_gate", "torch.compile"}


def test_regridding_is_timed_from_store_to_store(monkeypatch):
    """Limits of time and of the area mean are rows with bars."""
    monkeypatch.setattr(stores, "ROWS", 37)
    monkeypatch.setattr(stores, "COLUMNS", 72)
    monkeypatch.setattr(stores, "TARGET", "12x8")
    monkeypatch.setattr(stores, "_area_mean", lambda values: values.mean((-2, -1)))
    found = stores.regridding()
    peak = found.figures["peak memory of the command"]
    half = dataclasses.replace(peak, measure=lambda: 2.0**30 * 1.5)
    figures = {**found.figures, "peak memory of the command": half}
    comparison = dataclasses.replace(found, figures=figures)
    rows = {row["name"].partition(" · ")[2]: row for row in measure(comparison, rounds=1)}
    assert rows["conservative"]["unit"] == "ms/frame"
    limited = rows["conservative, a frame"]
    assert limited["ratio"] == pytest.approx(rows["conservative"]["value"] / 1000)
    assert (limited["baseline"], limited["bar"]) == ("1 s", 1.0)
    assert limited["met"] == (limited["ratio"] <= 1)
    memory = rows["peak memory of the command"]
    assert (memory["baseline"], memory["ratio"], memory["met"]) == ("1 GiB", 1.5, False)
    assert rows["change of the area mean"]["bar"] == 1e-6
    assert 0 < rows["change of the area mean"]["ratio"] < 1


@pytest.mark.slow
def test_frames_are_read_in_limits_of_time_and_memory(short):
    comparison = stores.frames()
    rows = {row["name"].partition(" · ")[2]: row for row in measure(comparison, rounds=1)}
    assert rows["read ahead"]["unit"] == "ms/frame"
    assert (rows["read ahead, a frame"]["baseline"], rows["read ahead, a frame"]["met"]) == (
        "1 s",
        True,
    )
    memory = rows["resident memory"]
    assert (memory["baseline"], memory["bar"]) == ("a frame", 3.0)
    assert memory["ratio"] == pytest.approx(memory["value"] / (4 * 69 * 9 * 16))
    calls = build(comparison)  # whose cache goes with it
    assert calls["read ahead"]() == pytest.approx(calls["zarr"]())
