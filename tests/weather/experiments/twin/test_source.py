"""Problems of a twin world, and the recording of its backgrounds."""

import math

import pytest
import torch
from torch.testing import assert_close

from core_gates.errors import GatesError
from weather.baselines.assimilator import FreeRun
from weather.experiments.twin.source import Recording, load_recording, record, save_recording
from weather.experiments.twin.world import LEAD

ORIGIN = '{"world_seed": 1}'


class Replace:
    """Takes the observed values as they are; at some calls it breaks one timeline."""

    members = 1

    def __init__(self, breaks=None):
        self.calls, self.breaks = 0, breaks

    def analyze(self, background, observations):
        seen = observations.mask[:, None]
        analysis = torch.where(seen, observations.values[:, None], background)
        if self.calls == self.breaks:
            analysis[0] = torch.nan
        self.calls += 1
        return analysis


def test_it_records_the_backgrounds_of_a_cycle(twin):
    world = twin.world
    recording = record(world, lambda density: FreeRun(), (0.3, 0.1), transient=3, stride=5)
    assert recording.time.tolist() == [0, 1, 2, 3, 8, 13, 18, 23]
    assert recording.background.shape == (8, 8, 3, 16, 32)
    assert sorted(zip(recording.member.tolist(), recording.model.tolist(), strict=True)) == sorted(
        (member, model) for member in range(4) for model in (0, 1)
    )
    forecasts = (world.model, world.imperfect)
    first = world.first_background("training")[:, 0]
    for row, (member, model) in enumerate(zip(recording.member, recording.model, strict=True)):
        state = first[member][None]
        assert torch.equal(recording.background[0, row], state[0])
        for number in range(1, 9):
            state = forecasts[model](state, world.hours)
            if number in (2, 8):
                got = recording.background[recording.time.tolist().index(number), row]
                torch.testing.assert_close(got, state[0], rtol=1e-6, atol=1e-3)
    assert recording.kept[:, recording.model == 0].all()
    assert not recording.kept[-1, recording.model == 1].any()  # a free run with an error is lost


def test_networks_have_their_density_and_differ(twin):
    recording = record(twin.world, lambda density: FreeRun(), (0.3, 0.1), transient=3)
    share = recording.network.float().mean((1, 2))
    assert (share[:4] - 0.3).abs().max() < 0.08
    assert (share[4:] - 0.1).abs().max() < 0.05
    tests = torch.cat([twin.world.networks(p, 0.3) for p in ("test", "tuning", "training")])
    assert not (recording.network[:, None] == tests).all((-2, -1)).any()


def test_recordings_depend_on_seeds_alone(twin):
    left, right = (
        record(twin.world, lambda density: Replace(), (0.3,), transient=3) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_a_lost_timeline_is_marked_from_then_on_and_stays_finite(twin):
    recording = record(
        twin.world, lambda density: Replace(breaks=7), (0.3,), transient=24, stride=1
    )
    time = recording.time
    for row in (0, 2):  # the first member of each part
        assert recording.kept[:, row].tolist() == (time < 7).tolist()
        world = twin.world
        truth = world.truth("training")[9, recording.member[row]][None]
        model = (world.model, world.imperfect)[recording.model[row]]
        expected = model(truth, world.hours)[0]
        torch.testing.assert_close(recording.background[10, row], expected, rtol=1e-6, atol=1e-3)
    assert recording.kept[:, [1, 3]].all()
    assert recording.background.isfinite().all()


def test_progress_is_reported_once_a_cycle(twin):
    seen = []
    record(twin.world, lambda d: FreeRun(), (0.3, 0.1), transient=3, tick=lambda: seen.append(1))
    assert len(seen) == twin.source().num_cycles == 4 * 24


def test_a_transient_longer_than_the_world_is_all_of_it(twin):
    recording = record(twin.world, lambda density: FreeRun(), (0.3,), transient=40)
    assert recording.time.tolist() == list(range(24))


def test_files_come_back_and_damage_is_one_line(twin, tmp_path, refused):
    recording = record(twin.world, lambda density: FreeRun(), (0.3,), transient=3)
    path = tmp_path / "new" / "recording.safetensors"
    save_recording(path, recording, ORIGIN)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    loaded = load_recording(path, ORIGIN)
    assert all(torch.equal(a, b) for a, b in zip(recording, loaded, strict=True))
    refused("recorded in another world", load_recording, path, ORIGIN.replace("1", "2"))
    whole = path.read_bytes()
    for length in (0, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(GatesError, match="not a readable recording") as caught:
            load_recording(path, ORIGIN)
        assert "\n" not in str(caught.value)
    refused("gates weather prepare", load_recording, tmp_path / "none", ORIGIN)
    torch.testing.assert_close(recording.time, loaded.time)


@pytest.fixture
def source(twin):
    source = twin.source()
    source.setup()
    return source


def same(left, right):
    parts = [zip(left, right, strict=True), zip(left.observations, right.observations, strict=True)]
    return all(
        torch.equal(a, b) for pairs in parts for a, b in pairs if isinstance(a, torch.Tensor)
    )


@pytest.mark.parametrize("validation", [False, True])
def test_a_problem_is_a_function_of_seed_step_and_timeline(twin, source, validation):
    other = twin.source()
    other.setup()
    for step, timeline in ((0, 0), (3, 5), (6, 2), (11, 1)):
        problem = source.problem(step, timeline, validation=validation)
        torch.rand(5)
        assert same(problem, other.problem(step, timeline, validation=validation))
        assert not same(problem, other.problem(step, timeline + 1, validation=validation))
    seeded = twin.source(seed=1)
    seeded.setup()
    assert not same(source.problem(3, 5), seeded.problem(3, 5))


def find(source, problem):
    """Index and row of a recorded background; the first one of a member is that of two rows."""
    found = (source.recording.background == problem.background).all(-1).all(-1).all(-1)
    found &= source.recording.model == problem.model
    assert found.sum() == 1
    return found.nonzero()[0].tolist()


def test_stage_one_pairs_backgrounds_with_their_truth_and_model(source, twin):
    for timeline in range(40):
        problem = source.problem(2, timeline)
        index, row = find(source, problem)
        time, member = int(source.recording.time[index]), int(source.recording.member[row])
        assert torch.equal(problem.truth, twin.world.truth("training")[time, member])
        assert problem.reset
        assert source.recording.kept[index, row]


def test_stage_two_deals_contiguous_blocks_of_one_member(source, twin):
    starts = set()
    for timeline in range(6):
        for block in range(3):
            first = 4 + 5 * block
            problems = [source.problem(first + position, timeline) for position in range(5)]
            index, row = find(source, problems[0])
            time, member = int(source.recording.time[index]), int(source.recording.member[row])
            truth = twin.world.truth("training")[time : time + 5, member]
            assert torch.equal(torch.stack([p.truth for p in problems]), truth)
            assert [bool(p.reset) for p in problems] == [True] + [False] * 4
            network = source.recording.network[row].expand(3, -1, -1)
            assert all(torch.equal(p.observations.mask, network) for p in problems)
            assert len({int(p.model) for p in problems}) == 1
            noise = [(p.observations.values - p.truth)[p.observations.mask] for p in problems]
            assert not torch.allclose(noise[0], noise[1])
            starts.add((index, row))
    assert len(starts) > 12


def test_lost_cycles_are_never_dealt(twin, tmp_path):
    source = twin.source()
    source.setup()
    kept = torch.zeros_like(source.recording.kept)
    kept[1, 2] = True
    source.recording = source.recording._replace(kept=kept)
    for step in (0, 3, 4, 9):
        for timeline in range(5):
            problem = source.problem(step, timeline)
            assert torch.equal(problem.background, source.recording.background[1, 2])


def test_half_of_the_problems_have_errors_of_their_own(source, twin):
    nominal = twin.world.error_sd[:, None, None]
    varied, scaled, factors = 0, [], []
    for timeline in range(120):
        problem = source.problem(0, timeline)
        mask = problem.observations.mask
        ratio = (problem.observations.errors / nominal)[mask]
        error = (problem.observations.values - problem.truth) / problem.observations.errors
        scaled.append(error[mask])
        if not torch.allclose(ratio, torch.ones_like(ratio)):
            varied += 1
            factors.append(ratio.log())
    assert 40 < varied < 80
    ratio = torch.cat(factors)
    low, high = math.log(0.5), math.log(10.0)
    assert low - 1e-5 <= ratio.min() < low + 0.01
    assert high - 0.01 < ratio.max() <= high + 1e-5
    assert_close(float(ratio.mean()), (low + high) / 2, rtol=0, atol=0.02)  # log-uniform
    assert_close(float(ratio.std()), (high - low) / math.sqrt(12), rtol=0, atol=0.02)
    each = torch.cat(scaled)
    assert abs(float(each.std()) - 1) < 0.02  # what is stated is what was added


@pytest.mark.parametrize(("share", "redrawn"), [(0.0, 0), (1.0, 60)])
def test_fresh_networks_have_their_share(twin, share, redrawn):
    source = twin.source(redraw_share=share)
    source.setup()
    problems = [source.problem(1, timeline) for timeline in range(60)]
    masks = [p.observations.mask[0] for p in problems]
    own = sum(any(torch.equal(m, n) for n in source.recording.network) for m in masks)
    assert own == 60 - redrawn
    if share:
        densities = torch.tensor([float(m.float().mean()) for m in masks])
        assert densities.min() > 0.06
        assert densities.max() < 0.38
        assert densities.max() / densities.min() > 2


def test_units_are_those_of_the_recorded_errors(source, twin):
    recording, truth = source.recording, twin.world.truth("training")
    weights = twin.world.grid.area_weights()[:, None]
    squares = [
        (recording.background[i, r] - truth[recording.time[i], recording.member[r]]).double() ** 2
        for i, r in recording.kept.nonzero().tolist()
    ]
    expected = (torch.stack(squares) * weights).mean((0, 2, 3)).sqrt()
    assert_close(source.background_sd.double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(source.problem(0, 0).background_sd, source.background_sd)
    assert torch.equal(source.normalizer.mean, twin.world.normalizer().mean)


def test_validation_cycles_members_of_its_own(source, twin, refused):
    world = twin.world
    states = world.states("validation")
    for timeline in range(4):
        member = timeline % 2
        network = world.networks("validation", (0.3, 0.1)[timeline % 2])[member]
        for step in (0, 1, 23):
            problem = source.problem(step, timeline, validation=True)
            assert torch.equal(problem.truth, states[LEAD + step, member])
            assert torch.equal(problem.background, states[0, member])
            assert bool(problem.reset) is (step == 0)
            assert torch.equal(problem.observations.mask, network.expand(3, -1, -1))
            errors = world.error_sd[:, None, None].expand(3, 16, 32)
            mask = problem.observations.mask
            assert_close(problem.observations.errors[mask], errors[mask])
            assert problem.model == 0
    refused("cycle 25 is beyond the 24 cycles", source.problem, 24, 0, validation=True)


def test_a_recording_is_made_once(twin, monkeypatch, refused):
    source = twin.source()
    before = source.path.stat().st_mtime_ns
    source.prepare()
    assert source.path.stat().st_mtime_ns == before
    monkeypatch.setattr(source, "path", source.path.with_name("missing.safetensors"))
    refused("gates weather prepare", source.setup)


@pytest.mark.parametrize(
    "changes",
    [{"scales": (0.2, 0.4)}, {"densities": (0.3, 0.2)}, {"length_km": 500.0}, {"transient": 2}],
)
def test_a_recording_of_other_settings_is_refused(twin, changes, refused):
    refused(f"another world .*{next(iter(changes))}.*delete it", twin.source(**changes).setup)
    twin.source(recorded_steps=1, block=2, redraw_share=0.5, seed=8).setup()  # made at training


def test_a_recording_without_use_is_refused(twin, tmp_path, refuses):
    source = twin.source()
    source.setup()
    lost = torch.zeros_like(source.recording.kept)
    source.path = tmp_path / "lost.safetensors"
    save_recording(source.path, Recording(*source.recording[:5], lost), source.origin)
    refuses(
        GatesError,
        ("no background that did not lose the truth", lambda: source.setup()),
        ("30 cycles to come", lambda: twin.source(block=30).setup()),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scales": (0.1,)}, "2 densities need as many scales, got 1"),
        ({"block": 0}, "block >= 1"),
        ({"recorded_steps": -1}, "recorded_steps >= 0"),
    ],
)
def test_impossible_arguments_are_refused(twin, changes, message, refused):
    refused(message, twin.source, **changes, error=ValueError)
