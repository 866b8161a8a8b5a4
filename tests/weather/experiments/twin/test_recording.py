import pytest
import torch

from core_gates.errors import GatesError
from weather.baselines.assimilator import FreeRun
from weather.experiments.twin.source import load_recording, record, save_recording

ORIGIN = '{"world_seed": 1}'


class Replace:
    """Takes the observed values as they are; at some calls it breaks one timeline."""

    members = 1

    def __init__(self, breaks=None):
        self.calls, self.breaks = 0, breaks

    def analyse(self, background, observations):
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


def test_observations_move_the_backgrounds(twin):
    world = twin.world
    free = record(world, lambda density: FreeRun(), (0.3,), transient=3)
    moved = record(world, lambda density: Replace(), (0.3,), transient=3)
    assert torch.equal(free.background[0], moved.background[0])
    same = torch.isclose(free.background[1:, :, 2], moved.background[1:, :, 2])
    assert not same.all(-1).all(-1).any()


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


def test_files_come_back_and_damage_is_one_line(twin, tmp_path):
    recording = record(twin.world, lambda density: FreeRun(), (0.3,), transient=3)
    path = tmp_path / "new" / "recording.safetensors"
    save_recording(path, recording, ORIGIN)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    loaded = load_recording(path, ORIGIN)
    assert all(torch.equal(a, b) for a, b in zip(recording, loaded, strict=True))
    with pytest.raises(GatesError, match="recorded in another world"):
        load_recording(path, ORIGIN.replace("1", "2"))
    whole = path.read_bytes()
    for length in (0, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(GatesError, match="not a readable recording") as caught:
            load_recording(path, ORIGIN)
        assert "\n" not in str(caught.value)
    with pytest.raises(GatesError, match="gates weather prepare"):
        load_recording(tmp_path / "none", ORIGIN)
    torch.testing.assert_close(recording.time, loaded.time)


def test_other_tensors_are_no_recording(tmp_path):
    from safetensors.torch import save_file

    save_file({"background": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(GatesError, match="not a readable recording"):
        load_recording(tmp_path / "a.safetensors", ORIGIN)
