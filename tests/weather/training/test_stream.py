"""What training is fed, and what it minimizes."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from weather.observations.gridded import GriddedObservations
from weather.training.optimization import channel_errors, log_loss, normalized_rmse, unify_loss
from weather.training.stream import (
    AssimilationBatch,
    AssimilationDataModule,
    generator,
    stack,
)


class Source:
    """Problems that name themselves; it counts how many were drawn."""

    def __init__(self):
        self.calls = []

    def problem(self, step, timeline, *, validation=False):
        self.calls.append((step, timeline))
        field = torch.full((1, 2, 3), 100.0 * step + timeline + 0.5 * validation)
        noise = torch.randn(1, 2, 3, generator=generator(step, timeline, int(validation)))
        return AssimilationBatch(
            timeline=torch.tensor(timeline),
            reset=torch.tensor(step == 0),
            background=field,
            truth=field + noise,
            observations=GriddedObservations(noise, noise.abs()),
            background_sd=torch.ones(1),
            model=torch.tensor(0),
        )


def data(world_size=1, rank=0, **arguments):
    sizes = {"steps": 5, "timelines": 4, "validation_steps": 3, "validation_timelines": 2}
    module = AssimilationDataModule(Source(), **(sizes | arguments))
    if world_size:
        module.trainer = SimpleNamespace(world_size=world_size, global_rank=rank)
    return module


def by_timeline(batches):
    """(step, timeline) to everything of that problem, as lists."""
    table = {}
    for step, batch in enumerate(batches):
        for row, timeline in enumerate(batch.timeline.tolist()):
            columns = [column[row].tolist() for column in batch if isinstance(column, torch.Tensor)]
            seen = [part[row].tolist() for part in batch.observations]
            assert (step, timeline) not in table
            table[step, timeline] = columns, seen
    return table


@pytest.mark.parametrize("name", ["train_dataloader", "val_dataloader"])
def test_two_ranks_share_the_problems_of_one(name):
    alone = by_timeline(getattr(data(), name)())
    ranks = [by_timeline(getattr(data(2, rank), name)()) for rank in (0, 1)]
    assert ranks[0] | ranks[1] == alone
    assert not ranks[0].keys() & ranks[1].keys()
    steps, timelines = (5, 4) if name == "train_dataloader" else (3, 2)
    assert set(alone) == set(itertools.product(range(steps), range(timelines)))


def test_training_and_validation_are_asked_for_as_such():
    assert next(iter(data().train_dataloader())).background.unique().tolist() == [0, 1, 2, 3]
    assert next(iter(data().val_dataloader())).background.unique().tolist() == [0.5, 1.5]


def test_without_a_trainer_all_timelines_are_here():
    assert len(next(iter(data(0).train_dataloader())).timeline) == 4


@given(st.integers(0, 4))
def test_a_resumed_loader_goes_on_without_drawing_what_was(stop):
    whole = by_timeline(data().train_dataloader())
    first = data().train_dataloader()
    broken = list(itertools.islice(first, stop))
    state = first.state_dict()
    assert state == {"position": stop}
    module = data()
    second = module.train_dataloader()
    second.load_state_dict(state)
    assert second.state_dict() == state  # saved again before the first step
    assert by_timeline(broken + list(second)) == whole
    assert min(module.source.calls)[0] == stop
    assert len(second) == len(first) == 5


def test_a_pass_begins_at_the_first_step_whatever_became_of_the_last():
    """A sanity check draws two validation batches and drops the rest of the pass."""
    loader = data().val_dataloader()
    list(itertools.islice(loader, 2))
    assert [bool(batch.reset.all()) for batch in loader] == [True, False, False]
    train = data().train_dataloader()
    train.load_state_dict({"position": 3})
    assert [len(list(train)), len(list(train))] == [2, 5]


def test_a_state_saved_at_the_end_of_an_epoch_begins_the_next():
    loader = data().train_dataloader()
    list(loader)
    again = data().train_dataloader()
    again.load_state_dict(loader.state_dict())
    assert len(list(again)) == 5


@pytest.mark.parametrize("name", ["timelines", "validation_timelines"])
def test_timelines_that_cannot_be_shared_are_refused(name, refused):
    module = data(2, 1, **{name: 3})
    load = module.val_dataloader if "val" in name else module.train_dataloader
    refused("3 timelines cannot be split evenly among 2 processes", lambda: list(load()))


@pytest.mark.parametrize("name", ["steps", "timelines", "validation_steps", "validation_timelines"])
def test_numbers_that_are_not_positive_are_refused(name, refused):
    refused(f"^{name} must be at least 1, got 0", data, **{name: 0}, error=ValueError)


def test_the_source_is_prepared_and_loaded():
    done = []
    module = data()
    module.source.prepare = lambda progress: done.append(progress)
    module.progress = "progress"
    module.source.setup = lambda: done.append("setup")
    module.prepare_data()
    module.setup("fit")
    assert done == ["progress", "setup"]


def test_stacking_keeps_the_observations_together():
    batch = stack([Source().problem(2, k) for k in (3, 1)])
    assert batch.timeline.tolist() == [3, 1]
    assert batch.observations.values.shape == batch.truth.shape == (2, 1, 2, 3)
    assert torch.equal(batch.truth, batch.background + batch.observations.values)


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=5))
def test_random_numbers_depend_on_the_keys_alone(keys):
    again = generator(*keys)
    assert torch.equal(torch.rand(3, generator=generator(*keys)), torch.rand(3, generator=again))
    other = generator(keys[0] + 1, *keys[1:])
    assert generator(*keys).initial_seed() != other.initial_seed()
    assert generator(*keys).initial_seed() < 2**63
    torch.manual_seed(0)
    state = torch.get_rng_state()
    generator(*keys)
    assert torch.equal(torch.get_rng_state(), state)


KINDS = ["mae", "mse"]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(batch=1):
    scale = torch.tensor([1.0, 30.0, 0.01, 4.0], dtype=torch.float64)[:, None, None]
    return (randn(batch, 4, 3, 6) * scale).requires_grad_(), randn(batch, 4, 3, 6, seed=1) * scale


@pytest.mark.parametrize("kind", KINDS)
def test_value_is_the_first_channel_and_gradient_that_of_the_mean_log(kind):
    analysis, truth = pair()
    loss = unify_loss(analysis, truth, kind=kind)
    errors = channel_errors(analysis, truth, kind=kind)
    assert_close(loss, errors[0, 0])
    (gradient,) = torch.autograd.grad(loss, analysis)
    (expected,) = torch.autograd.grad(errors.log().mean(), analysis, retain_graph=True)
    assert_close(gradient, expected * errors[0, 0].detach())
    (of_log,) = torch.autograd.grad(log_loss(analysis, truth, kind=kind, epsilon=0), analysis)
    assert_close(of_log, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_the_mean_of_its_samples(kind):
    analysis, truth = pair(batch=3)
    for loss in (unify_loss, log_loss):
        whole = loss(analysis, truth, kind=kind)
        parts = [loss(analysis[i : i + 1], truth[i : i + 1], kind=kind) for i in range(3)]
        assert_close(whole, torch.stack(parts).mean())
        grads = [torch.autograd.grad(y, analysis)[0] for y in (whole, torch.stack(parts).mean())]
        assert_close(*grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_perfect_channels_give_no_nan(kind, dtype):
    for perfect in ([0], [2], [0, 1, 2, 3]):
        analysis, truth = (x.detach().to(dtype) for x in pair())
        analysis[:, perfect] = truth[:, perfect]
        analysis.requires_grad_()
        for loss in (unify_loss, log_loss):
            value = loss(analysis, truth, kind=kind)
            value.backward()
            assert value.isfinite()
            assert analysis.grad.isfinite().all()


def test_rows_are_weighted_by_area():
    analysis, truth = pair()
    weights = torch.tensor([0.0, 3.0, 0.0], dtype=torch.float64)
    for kind in KINDS:
        for loss in (unify_loss, log_loss):
            middle = loss(analysis[..., 1:2, :], truth[..., 1:2, :], kind=kind)
            assert_close(loss(analysis, truth, kind=kind, area_weights=weights), middle)
    error, std = analysis - truth, torch.ones(4).double()
    assert_close(normalized_rmse(error, std, weights), normalized_rmse(error[..., 1:2, :], std))


def test_score_sees_every_channel_where_the_loss_sees_the_first():
    truth, std = torch.zeros(1, 4, 2, 2), torch.tensor([1.0, 10.0, 1.0, 1.0])
    first_only = torch.full_like(truth, 3.0)
    first_only[:, 0] = 0
    fair = torch.full_like(truth, 0.5)
    assert unify_loss(first_only, truth) < unify_loss(fair, truth)
    assert normalized_rmse(first_only, std) > normalized_rmse(fair, std)


def test_score_is_the_mean_of_rmse_over_standard_deviation():
    error = torch.tensor([[3.0, -3.0], [1.0, 1.0]]).view(1, 2, 1, 2).expand(2, 2, 1, 2)
    assert_close(normalized_rmse(error, torch.tensor([3.0, 2.0])), torch.tensor([0.75, 0.75]))


def test_misuse_is_refused(refuses):
    x = torch.zeros(1, 4, 2, 2)
    refuses(
        ValueError,
        ("must both be", lambda: unify_loss(x, x[:, :3])),
        ("'mae' or 'mse'", lambda: unify_loss(x, x, kind="huber")),
        ("standard deviation", lambda: normalized_rmse(x, torch.ones(3))),
    )
