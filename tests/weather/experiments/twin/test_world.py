import itertools
import shutil

import pytest
import torch
from torch.testing import assert_close

from core_gates.errors import GatesError
from weather.experiments.twin.world import LEAD, TwinWorld

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
    assert LEAD * world.hours == 24.0
    assert len(world.truth("tuning")) == world.cycles
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


def test_redrawn_networks_change_with_every_cycle(twin):
    masks = [seen.mask[:, 0] for seen in twin.world.observations("test", 0.2, redraw=True)]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(masks, 2))
    again = [seen.mask[:, 0] for seen in twin.world.observations("test", 0.2, redraw=True)]
    assert all(torch.equal(a, b) for a, b in zip(masks, again, strict=True))


def test_observations_err_as_stated(twin):
    world = twin.world
    stacked = list(world.observations("training", 0.5))
    values = torch.stack([seen.values for seen in stacked])
    mask = torch.stack([seen.mask for seen in stacked])
    error = torch.where(mask, values - world.truth("training"), torch.nan)
    scaled = error / world.error_sd[:, None, None]
    for channel in range(3):
        one = scaled[:, :, channel][mask[:, :, channel]]
        assert abs(float(one.mean())) < 0.02
        assert abs(float(one.std()) - 1) < 0.02
    first, second = scaled[0][mask[0]], scaled[1][mask[1]]  # the same points: a fixed network
    assert abs(float((first * second).mean())) < 0.05
    expected = world.error_sd[:, None, None].expand_as(values)
    errors = torch.stack([seen.errors for seen in stacked])
    assert_close(errors[mask], expected[mask])


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


def test_nature_must_have_been_made(twin, tmp_path):
    world = twin.make(tmp_path / "none.zarr")
    with pytest.raises(GatesError, match=r"no nature run at .*none\.zarr.*gates weather prepare"):
        world.truth("test")


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
def test_impossible_worlds_are_refused(twin, changes, message):
    world = twin.world
    with pytest.raises(GatesError, match=message):
        TwinWorld(world.model, world.imperfect, "none", **changes)


def test_a_damaged_nature_run_is_named(twin, tmp_path):
    path = tmp_path / "nature.zarr"
    shutil.copytree(twin.world.path, path)
    world = twin.make(path)
    next((path / "height").glob("1.*")).write_bytes(b"nothing like a chunk")
    with pytest.raises(GatesError) as caught:
        world.truth("test")
    assert str(caught.value).startswith(f"{path}: height cannot be read: ")
    assert str(caught.value).endswith("or delete it and run `gates weather prepare`")
