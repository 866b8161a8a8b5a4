import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close

from endoscopy.metrics.classification import TRUTH
from endoscopy.training.targets import Classes, LogSize, Ordinal, ScaledMillimeters

SIZES = torch.tensor([1.0, 4.9, 5.0, 5.1, 9.9, 10.0, 15.0, 21.0])


@given(st.lists(st.floats(0.5, 22.0), min_size=1, max_size=8))
def test_regressions_round_trip(sizes):
    mm = torch.tensor(sizes, dtype=torch.float64)
    for target in (LogSize(), ScaledMillimeters()):
        assert_close(target.decode(target.encode(mm).unsqueeze(1)), mm)


def test_published_scale_and_clipping(vectors):
    tensors = vectors("weighted_size_loss_s51")
    target = ScaledMillimeters()
    assert_close(target.decode(tensors["inv.in"].unsqueeze(1)), tensors["inv.out"])
    assert_close(target.encode(torch.tensor([0.5, 20.0])), torch.tensor([-1.0, 1.0]))
    assert target.decode(torch.tensor([[-9.0], [9.0]])).tolist() == [0.5, 22.0]


def test_log_size_is_the_smooth_l1_loss_of_the_logarithm():
    target, raw = LogSize(beta=0.1, center_mm=8.0), torch.randn(8, 1)
    expected = F.smooth_l1_loss(raw[:, 0], (SIZES / 8).log(), beta=0.1)
    assert_close(target.loss(raw, SIZES), expected)
    assert_close(target.decode(torch.zeros(1, 1)), torch.tensor([8.0]))
    assert target.decode(torch.tensor([[99.0], [-99.0]])).tolist() == [60.0, 0.5]


def test_losses_of_half_precision_are_computed_in_single():
    raw = torch.tensor([[0.1003]], dtype=torch.float16)
    for target in (LogSize(), ScaledMillimeters(), Ordinal((5.0,)), Classes((5.0,), (3.0, 8.0))):
        wide = raw.repeat(1, target.outputs)
        assert target.loss(wide, SIZES[:1]).dtype == target.decode(wide).dtype == torch.float32
        assert target.loss(wide.double(), SIZES[:1]).dtype == torch.float64


@pytest.mark.parametrize("target", [Ordinal(), Classes()], ids=["ordinal", "classes"])
def test_classes_are_the_clinical_ones(target):
    expected = torch.from_numpy(TRUTH.classes(SIZES.numpy()))
    assert torch.equal(target.encode(SIZES), expected)
    raw = torch.randn(8, target.outputs, dtype=torch.float64)
    probabilities = target.probabilities(raw)
    assert probabilities.shape == (8, 3)
    assert_close(probabilities.sum(1), torch.ones(8, dtype=torch.float64))
    log_p = probabilities.log().gather(1, expected.unsqueeze(1))
    assert_close(target.loss(raw, SIZES), -log_p.mean())  # the likelihood of the class


@pytest.mark.parametrize("target", [Ordinal(), Classes()], ids=["ordinal", "classes"])
def test_a_lower_bound_is_as_likely_as_all_that_it_allows(target):
    raw = torch.randn(3, target.outputs, dtype=torch.float64)
    bounds = torch.tensor([3.0, 7.0, 15.0])
    probabilities = target.probabilities(raw)
    allowed = torch.stack([probabilities[i, i:].sum() for i in range(3)])
    loss = target.loss(raw, bounds, torch.tensor([True, True, True]))
    assert_close(loss, -allowed.log().mean())
    assert loss < target.loss(raw, bounds)


def test_sizes_of_classes_lie_where_the_probability_is():
    ordinal, classes = Ordinal(limits_mm=(0.5, 22.0)), Classes()
    for sure, between, typical in (
        ([-50.0, 0.0], (0.5, 5.0), 3.5),
        ([50.0, -50.0], (5.0, 10.0), 7.0),
        ([50.0, 50.0], (10.0, 22.0), 14.0),
    ):
        mm = ordinal.decode(torch.tensor([sure]))
        assert between[0] < mm < between[1]
        assert_close(mm, torch.tensor([sum(between) / 2]))  # P falls linearly between the edges
        logits = torch.full((1, 3), -50.0)
        logits[0, [3.5, 7.0, 14.0].index(typical)] = 50.0
        assert_close(classes.decode(logits), torch.tensor([typical]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LogSize(beta=0), "beta must be positive"),
        (lambda: LogSize(center_mm=90.0), "0 < low < center < high"),
        (lambda: ScaledMillimeters(range_mm=(20.0, 0.5)), "must increase"),
        (lambda: Ordinal((10.0, 5.0)), "sizes must be positive and increasing"),
        (lambda: Ordinal((30.0,)), "sizes must be positive and increasing"),
        (lambda: Classes((5.0,)), "1 thresholds separate 2 classes, but typical_mm has 3"),
    ],
)
def test_arguments_are_checked(make, message, refused):
    refused(message, make, error=ValueError)


@pytest.mark.fault("faults 5")
@pytest.mark.parametrize("cut", [5, 10])
def test_a_size_on_a_cut_off_has_the_clinical_class_in_tasks_of_two_classes(cut):
    target = [Ordinal((float(cut),)), Classes((float(cut),), (3.0, 12.0))]
    truth = TRUTH.classes(SIZES) >= (1 if cut == 5 else 2)
    for one in target:
        assert one.encode(SIZES).tolist() == truth.astype(int).tolist()
    mm = torch.tensor([4.75, 5.0, 10.0, 15.0])
    assert Ordinal((4.75, 10.0)).encode(mm).tolist() == [0, 1, 2, 2]
    assert Ordinal((5.0, 10.0, 15.0)).encode(mm).tolist() == [0, 0, 2, 3]
