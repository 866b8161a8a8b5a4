import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close

from endoscopy.training.losses import CensoredSmoothL1, SizeWeightedLoss, one_sided_error
from endoscopy.training.targets import ScaledMillimeters

EXACT = {"rtol": 1e-9, "atol": 1e-11}


def loss_of(config, **options):
    alpha, beta, gamma, first, middle, second, large = config.tolist()
    return SizeWeightedLoss(alpha, beta, gamma, (first, second), (middle, large), **options)


@pytest.mark.parametrize("number", range(4))
def test_published_losses(number, vectors):
    tensors = vectors("weighted_size_loss_s51")
    case = {k.partition(".")[2]: v for k, v in tensors.items() if k.startswith(f"c{number}.")}
    loss = loss_of(case["cfg"])
    for space in ("mm", "scaled"):  # the published trainer passes scaled sizes as if millimeters
        prediction = case[f"pred_{space}"].requires_grad_()
        target = case[f"target_{space}"]
        value = loss(prediction, target, target)
        assert_close(value, case[f"loss_{space}"], **EXACT)
        (grad,) = torch.autograd.grad(value, prediction)
        assert_close(grad, case[f"grad_{space}"], **EXACT)


@pytest.mark.parametrize("space", ["mm", "scaled"])
def test_the_weights_apply_in_either_space(space, vectors):
    """On the very inputs for which the published ones do not."""
    tensors = vectors("weighted_size_loss_s51")
    loss = loss_of(tensors["c0.cfg"], space=space)
    mm, raw = tensors["c0.target_mm"], tensors["c0.pred_scaled"].unsqueeze(1)
    ours = ScaledMillimeters(loss).loss(raw, mm)
    unweighted = SizeWeightedLoss(weights=(1.0, 1.0), space=space)
    plain = ScaledMillimeters(unweighted).loss(raw, mm)
    if space == "scaled":
        assert_close(plain, tensors["c0.loss_scaled"], rtol=1e-7, atol=0)  # scaled in float32
    assert ours > 1.5 * plain
    assert set(loss.weight(mm).tolist()) == {1.0, 3.0, 5.0}


def test_thresholds_belong_to_the_heavier_side_above_and_the_lighter_below():
    loss = SizeWeightedLoss()
    sizes = torch.tensor([1.0, 5.0, 5.1, 9.9, 10.0, 15.0])
    assert loss.weight(sizes).tolist() == [1, 1, 3, 3, 5, 5]


def test_a_lower_bound_may_be_exceeded_but_not_missed():
    bound = torch.tensor([15.0, 15.0, 15.0])
    prediction = torch.tensor([10.0, 15.0, 20.0], requires_grad=True)
    censored = torch.tensor([True, True, True])
    for loss in (CensoredSmoothL1(1.0), SizeWeightedLoss()):
        sizes = (bound,) if isinstance(loss, SizeWeightedLoss) else ()
        value = loss(prediction, bound, *sizes, censored)
        (grad,) = torch.autograd.grad(value, prediction)
        assert grad[0] < 0
        assert grad[1] == grad[2] == 0
        assert_close(value, loss(prediction[:1], bound[:1], *[s[:1] for s in sizes]) / 3)
        assert loss(prediction, bound, *sizes, ~censored) > value


@given(
    st.lists(
        st.tuples(st.floats(-30, 30), st.floats(0.1, 30), st.booleans()), min_size=1, max_size=8
    )
)
def test_one_sided_errors(rows):
    prediction, target, censored = (torch.tensor(column) for column in zip(*rows, strict=True))
    error = one_sided_error(prediction, target, censored)
    plain = prediction - target
    assert torch.equal(error[~censored], plain[~censored])
    assert torch.equal(error[censored], plain[censored].clamp(max=0))
    assert torch.equal(one_sided_error(prediction, target, None), plain)
    smooth = CensoredSmoothL1(0.1)(prediction, target)
    assert_close(smooth, F.smooth_l1_loss(prediction, target, beta=0.1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CensoredSmoothL1(0.0), "beta must be positive"),
        (lambda: SizeWeightedLoss(thresholds=(10, 5)), r"thresholds must increase, got \(10, 5\)"),
        (lambda: SizeWeightedLoss(alpha=-1.0), "must not be negative"),
        (lambda: SizeWeightedLoss(gamma=0.0), "nor all three factors zero"),
        (lambda: SizeWeightedLoss(space="cm"), "space is 'cm'; choose mm or scaled"),
    ],
)
def test_arguments_are_checked(make, message, refused):
    refused(message, make, error=ValueError)
