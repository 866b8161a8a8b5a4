import pytest
import torch
from torch.testing import assert_close

from weather.training.optimization import channel_errors, log_loss, normalized_rmse, unify_loss

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
    score = normalized_rmse(error, torch.tensor([3.0, 2.0]))
    assert_close(score, torch.tensor([0.75, 0.75]))


def test_misuse_is_refused():
    x = torch.zeros(1, 4, 2, 2)
    with pytest.raises(ValueError, match="must both be"):
        unify_loss(x, x[:, :3])
    with pytest.raises(ValueError, match="'mae' or 'mse'"):
        unify_loss(x, x, kind="huber")
    with pytest.raises(ValueError, match="standard deviation"):
        normalized_rmse(x, torch.ones(3))
