"""Nature runs that survive being killed, and the twin worlds made of them."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
import xarray as xr
import zarr
from torch.testing import assert_close

from weather.experiments.twin.nature import CHUNK, nature_run, write_nature_run
from weather.experiments.twin.world import LEAD, TwinWorld
from weather.grid import regular_grid
from weather.state import ChannelSpec

CHANNELS = ChannelSpec(
    surface=("surface_pressure",), upper=("temperature", "geopotential"), levels=(850, 500)
)


class Counting:
    """A chaotic map that counts its calls and can fail at one of them."""

    description = "Counting()"
    channels = CHANNELS
    grid = regular_grid(4, 8, poles=False)

    def __init__(self, fail_at=None):
        self.calls = 0
        self.fail_at = fail_at

    def initial_state(self, members, *, seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(members, 5, 4, 8, generator=generator)

    def __call__(self, state, hours):
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        return 3.9 * state.double() * (1 - state.double()) + 1e-3 * hours / 6


def run(path, model, **changes):
    arguments = {"members": 3, "num_steps": 47, "spin_up_days": 7.0, "seed": 1} | changes
    return write_nature_run(path, model, **arguments)


def stored(path):
    with xr.open_zarr(path, chunks=None) as dataset:
        return dataset.load()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted."""
    return stored(run(tmp_path_factory.mktemp("nature") / "whole.zarr", Counting()))


def test_generator_rounds_to_float32_and_starts_with_the_given_state():
    model = Counting()
    start = model.initial_state(2, seed=0)
    states = list(nature_run(model, start, 4))
    assert model.calls == 3
    assert torch.equal(states[0], start)
    for before, after in itertools.pairwise(states):
        assert after.dtype == torch.float32
        assert torch.equal(after, model(before, 6.0).float())


def test_divergence_is_an_error_that_says_when(refused):
    refused(
        "not finite after 12 hours",
        list,
        nature_run(lambda state, hours: state / (1 - state), torch.tensor([0.5]), 9),
    )


def test_store_follows_the_schema(tmp_path):
    seen = []
    path = run(tmp_path / "deep" / "run.zarr", Counting(), progress=lambda *done: seen.append(done))
    assert seen == [(step, 28 + 46) for step in range(1, 75)]
    assert [entry.name for entry in path.parent.iterdir()] == ["run.zarr"]
    assert (path / ".zmetadata").exists()
    data = stored(path)
    assert data["temperature"].dims == ("time", "number", "level", "latitude", "longitude")
    assert data["surface_pressure"].dims == ("time", "number", "latitude", "longitude")
    assert data["temperature"].shape == (47, 3, 2, 4, 8)
    assert data["level"].values.tolist() == [850, 500]
    types = {name: data[name].dtype for name in ("level", "number", "temperature")}
    assert types == {"level": np.int64, "number": np.int64, "temperature": np.float32}
    assert data["temperature"].attrs["units"] == "K"
    raw = zarr.open_group(path, mode="r")["time"]
    assert (raw.dtype, raw.attrs["units"]) == (np.int64, "seconds since 2000-01-01")
    assert (np.diff(data["time"].values) == np.timedelta64(6, "h")).all()
    start = Counting().initial_state(3, seed=1)
    states = torch.stack(list(nature_run(Counting(), start, 28 + 47))[28:])  # seven days spin up
    np.testing.assert_array_equal(data["surface_pressure"], states[:, :, 0])
    np.testing.assert_array_equal(data["geopotential"], states[:, :, 3:])


@pytest.mark.parametrize("fail_at", [1, 20, 21, 28, 29, 30, 48, 49, 73, 74])
def test_interrupted_run_goes_on_from_its_last_save_point(tmp_path, whole, fail_at):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut.zarr", Counting(fail_at))
    assert not (tmp_path / "cut.zarr").exists()
    model = Counting()
    run(tmp_path / "cut.zarr", model)
    assert model.calls <= 74 - fail_at + 1 + CHUNK
    xr.testing.assert_identical(stored(tmp_path / "cut.zarr"), whole)
    assert [entry.name for entry in tmp_path.iterdir()] == ["cut.zarr"]


def test_damaged_block_after_the_save_point_is_written_again(tmp_path, whole):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut.zarr", Counting(60))
    partial = tmp_path / ".cut.zarr.partial"
    (partial / "store" / "temperature" / "1.0.0.0.0").write_bytes(b"half a chunk")
    (partial / "point.draft.npz").write_bytes(b"half a save point")
    run(tmp_path / "cut.zarr", Counting())
    xr.testing.assert_identical(stored(tmp_path / "cut.zarr"), whole)


def test_complete_run_is_left_alone_and_another_is_refused(tmp_path, refused):
    path = run(tmp_path / "run.zarr", Counting())
    model = Counting()
    run(path, model)
    run(path, model, num_steps=10)
    assert model.calls == 0
    for changes in ({"seed": 2}, {"members": 4}, {"num_steps": 48}, {"hours": 12.0}):
        refused("another run", run, path, model, **changes)
    other = Counting()
    other.description = "Counting(1)"
    refused("remove it or name another path", run, path, other)
    (tmp_path / "file").write_text("text")
    refused("no nature run", run, tmp_path / "file", model)


def test_unfinished_run_of_other_settings_is_discarded(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run.zarr", Counting(40))
    model = Counting()
    run(tmp_path / "run.zarr", model, seed=2)
    assert model.calls == 74
    identity = json.loads(stored(tmp_path / "run.zarr").attrs["nature_run"])
    assert identity["seed"] == 2


def test_short_run_without_spin_up(tmp_path, refused):
    path = run(tmp_path / "run.zarr", Counting(), num_steps=1, spin_up_days=0.0)
    first = stored(path)["surface_pressure"].values[0]
    np.testing.assert_array_equal(first, Counting().initial_state(3, seed=1)[:, 0])
    refused("num_steps >= 1", run, tmp_path / "none.zarr", Counting(), num_steps=0)


PERIODS = ("test", "tuning", "validation", "training")


def test_a_world_is_its_seeds(twin, tmp_path):
    again = twin.make(tmp_path / "again.zarr", num_training=2)
    again.prepare()
    for period in ("test", "tuning", "validation"):  # the first members, whatever follows them
        assert torch.equal(again.states(period), twin.world.states(period))
        assert torch.equal(again.networks(period, 0.2), twin.world.networks(period, 0.2))
    pairs = zip(again.observations("test", 0.2), twin.world.observations("test", 0.2), strict=True)
    for left, right in pairs:
        assert torch.equal(left.values, right.values)
        assert torch.equal(left.errors, right.errors)
    other = twin.make(tmp_path / "other.zarr", seed=1)
    other.prepare()
    assert (
        not torch.isclose(other.states("test")[:, :, 2], again.states("test")[:, :, 2]).any(0).all()
    )
    assert not torch.equal(other.networks("test", 0.2), again.networks("test", 0.2))


def test_periods_share_no_state(twin):
    world = twin.world
    members = [set(world.members[period]) for period in PERIODS]
    assert not any(left & right for left, right in itertools.combinations(members, 2))
    assert set().union(*members) == set(range(world.num_members))
    winds = world.nature[:, :, 2].flatten(2).transpose(0, 1)  # (members, T, points)
    for left, right in itertools.combinations(range(world.num_members), 2):
        assert torch.cdist(winds[left], winds[right]).min() > 1.0
    networks = torch.cat([world.networks(period, 0.2) for period in PERIODS])
    for left, right in itertools.combinations(networks, 2):
        assert not torch.equal(left, right)


def test_a_perfect_free_run_from_the_truth_is_nature(twin):
    world = twin.world
    state = world.states("test")[0]
    for following in world.states("test")[1:]:
        state = world.model(state, world.hours)
        assert torch.equal(state, following)
    assert not torch.equal(world.imperfect(world.states("test")[0], 6.0), world.states("test")[1])


def test_the_first_background_is_the_truth_of_a_day_before(twin):
    world = twin.world
    first = world.first_background("tuning")
    assert first.shape == (2, 1, 3, 16, 32)
    assert torch.equal(world.model(first[:, 0], 24.0), world.truth("tuning")[0])
    assert (LEAD * world.hours, len(world.truth("tuning"))) == (24.0, world.cycles)
    assert torch.equal(world.truth("tuning")[0], world.states("tuning")[LEAD])


def test_networks_are_fixed_and_nested(twin):
    world = twin.world
    few, many = world.networks("test", 0.1), world.networks("test", 0.4)
    assert (few <= many).all()
    assert few.sum() < many.sum()
    for density, network in ((0.1, few), (0.4, many)):
        assert abs(float(network.float().mean()) - density) < 0.05
        for observations in world.observations("test", density):
            mask = observations.mask
            assert torch.equal(mask, network[:, None].expand_as(mask))  # all variables together


def test_observations_err_as_stated(twin):
    world = twin.world
    values, errors = map(torch.stack, zip(*world.observations("training", 0.5), strict=True))
    sd = world.error_sd[:, None, None].expand_as(values)
    seen = errors.isfinite()
    assert_close(errors[seen], sd[seen])
    scaled = (values - world.truth("training")) / sd
    for channel in scaled.where(seen, torch.nan).unbind(2):
        one = channel[channel.isfinite()]
        assert abs(float(one.mean())) < 0.02
        assert abs(float(one.std()) - 1) < 0.02
    first, second = scaled[0][seen[0]], scaled[1][seen[1]]  # the same points: a fixed network
    assert abs(float((first * second).mean())) < 0.05


def test_statistics_are_those_of_the_training_members(twin):
    world = twin.world
    training = world.states("training")
    climatology = world.climatology()
    assert_close(climatology, training.double().mean((0, 1)).float(), rtol=1e-5, atol=1e-3)
    weights = world.grid.area_weights()[:, None]
    square = (training[::8] - climatology).double().square() * weights
    assert_close(
        world.climatological_sd().double(), square.mean((0, 1, 3, 4)).sqrt(), rtol=1e-4, atol=1e-4
    )
    normalizer = world.normalizer()
    assert_close(
        normalizer.mean.double(),
        (training[::8].double() * weights).mean((0, 1, 3, 4)),
        rtol=1e-5,
        atol=1e-4,
    )
    differences = world.day_differences()
    assert torch.equal(differences[:4], training[4] - training[0])
    assert len(differences) == 4 * ((len(training) - 1) // LEAD)
    assert torch.equal(differences[-4:], training[24] - training[20])


def test_nature_must_have_been_made(twin, tmp_path, refused):
    world = twin.make(tmp_path / "none.zarr")
    refused(r"no nature run at .*none\.zarr.*gates weather prepare", world.truth, "test")


def test_progress_counts_every_call(twin, tmp_path):
    world = twin.make(tmp_path / "short.zarr", cycles=2, spin_up_days=1.1, num_training=2)
    seen = []
    world.prepare(lambda done, total: seen.append((done, total)))
    assert seen == [(n, world.calls) for n in range(1, world.calls + 1)]
    assert world.calls == 5 + 2 + LEAD - 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"error_sd": (10.0, 1.0)}, "error_sd has 2 values, expected 3, one each for h, u, v"),
        ({"num_training": 1}, "at least 2 training members, got 1"),
        ({"num_tests": 0}, "at least 1 test members, got 0"),
    ],
)
def test_impossible_worlds_are_refused(twin, changes, message, refused):
    world = twin.world
    refused(message, TwinWorld, world.model, world.imperfect, "none", **changes)


def test_a_damaged_nature_run_is_named(twin, tmp_path, refused):
    path = tmp_path / "nature.zarr"
    shutil.copytree(twin.world.path, path)
    world = twin.make(path)
    next((path / "height").glob("1.*")).write_bytes(b"nothing like a chunk")
    words = f"^{path}: height cannot be read: .*or delete it and run `gates weather prepare`$"
    refused(words, world.truth, "test")
