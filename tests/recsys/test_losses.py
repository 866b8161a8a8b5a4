import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close

from recsys.schema import Task
from recsys.validation import MultiTaskLoss, task_sums

TASKS = [Task("click"), Task("like", weight=0.5), Task("buy", weight=0)]


def drawn(rows=9, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, 3, generator=g, dtype=torch.float64).requires_grad_()
    labels = torch.randint(0, 2, (rows, 3), generator=g).double()
    mask = torch.rand(rows, 3, generator=g) < 0.6
    return logits, labels, mask, torch.rand(rows, generator=g, dtype=torch.float64)


def test_the_formula():
    """``mean_b(m BCE) / mean m`` with sample weights, written out row by row."""
    logits, labels, mask, weight = drawn()
    losses = MultiTaskLoss(TASKS)(logits, labels, mask, weight)
    for t in range(3):
        above = below = 0.0
        for b in range(9):
            p = logits[b, t].sigmoid()
            bce = -(labels[b, t] * p.log() + (1 - labels[b, t]) * (1 - p).log())
            above += weight[b] * mask[b, t] * bce / 9
            below += weight[b] * mask[b, t] / 9
        assert_close(losses[t], above / below, rtol=1e-12, atol=0)


def test_without_masks_and_weights_it_is_the_mean():
    logits, labels, _, _ = drawn()
    everywhere, ones = torch.ones(9, 3, dtype=torch.bool), torch.ones(9, dtype=torch.float64)
    losses = MultiTaskLoss(TASKS)(logits, labels, everywhere, ones)
    wanted = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(0)
    assert_close(losses, wanted)


def test_masked_labels_and_logits_do_not_matter():
    logits, labels, mask, weight = drawn()
    losses = MultiTaskLoss(TASKS)(logits, labels, mask, weight)
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    assert (grad[~mask] == 0).all()
    assert (grad[mask] != 0).all()
    missing = labels.masked_fill(~mask, torch.nan)
    assert_close(MultiTaskLoss(TASKS)(logits, missing, mask, weight), losses, rtol=0, atol=0)


def test_a_task_that_counts_nowhere_costs_nothing():
    logits, labels, mask, weight = drawn()
    mask[:, 1] = False
    losses = MultiTaskLoss(TASKS)(logits, labels, mask, weight)
    assert losses[1] == 0
    assert losses[0] > 0
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    assert torch.isfinite(grad).all()


@pytest.mark.fault("video R4")
def test_which_tasks_count():
    logits, labels, mask, weight = drawn()
    mask[:, 1] = False
    found = MultiTaskLoss(TASKS).counted(logits, labels, mask, weight)
    assert found.counted.tolist() == [True, False, True]
    assert torch.equal(found.losses, MultiTaskLoss(TASKS)(logits, labels, mask, weight))
    weight[mask[:, 2]] = 0  # rows that weigh nothing
    found = MultiTaskLoss(TASKS).counted(logits, labels, mask, weight)
    assert not found.counted[2]


@given(st.integers(1, 5), st.floats(0.1, 10))
def test_repeated_rows_and_scaled_weights_change_nothing(times, scale):
    logits, labels, mask, weight = drawn()
    losses = MultiTaskLoss(TASKS)(logits, labels, mask, weight)
    rows = torch.arange(9).repeat(times)
    again = MultiTaskLoss(TASKS)(logits[rows], labels[rows], mask[rows], scale * weight[rows])
    assert_close(again, losses)


def test_sums_of_parts_are_those_of_the_whole():
    parts = [drawn(rows, seed) for seed, rows in enumerate((4, 7))]
    whole = task_sums(*(torch.cat(column) for column in zip(*parts, strict=True)))
    found = [task_sums(*part) for part in parts]
    for name in ("losses", "weights"):
        assert_close(sum(getattr(f, name) for f in found), getattr(whole, name))


def test_half_precision_is_computed_in_float32():
    logits, labels, mask, weight = drawn()
    half = logits.detach().to(torch.bfloat16)
    losses = MultiTaskLoss(TASKS)(half, labels.float(), mask, weight.float())
    assert losses.dtype == torch.float32
    wanted = MultiTaskLoss(TASKS)(half.float(), labels.float(), mask, weight.float())
    assert_close(losses, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("wrong", ["labels", "mask", "weight"])
def test_shapes_are_checked(wrong):
    given_ = dict(zip(("logits", "labels", "mask", "weight"), drawn(), strict=True))
    given_[wrong] = given_[wrong][:4]
    with pytest.raises(ValueError, match=r"\(9, 3\).* must be \(B, T\) three times and \(B,\)"):
        MultiTaskLoss(TASKS)(**given_)


def two_halves(parallel):
    """The gradient of a linear model whose ranks have masks of different density."""
    _, labels, mask, weight = drawn(8, 3)
    mask[:4] = True
    mask[4:, 1] = False
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    torch.manual_seed(0)
    model = parallel(torch.nn.Linear(4, 3).double())
    found = MultiTaskLoss(TASKS)(
        model(parallel.share(x)), *(parallel.share(t) for t in (labels, mask, weight))
    )
    found.sum().backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.costly("two processes that import torch")
def test_two_ranks_have_the_gradient_of_all_rows(two_ranks):
    two_ranks(two_halves, tolerance=1e-12)
