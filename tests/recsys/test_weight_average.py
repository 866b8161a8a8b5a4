import pytest
import torch
from torch import nn
from torch.testing import assert_close

from recsys.validation import WeightAverage


def test_the_formula():
    w = {"net.a": nn.Parameter(torch.tensor([1.0, -2.0]))}
    average = WeightAverage(w, 0.3)
    expected = w["net.a"].detach().clone()
    for step in range(1, 5):
        with torch.no_grad():
            w["net.a"] += step
        average.update(w)
        d = min(0.3, (1 + step) / (10 + step))
        expected = d * expected + (1 - d) * w["net.a"].detach()
    assert (1 + 1) / (10 + 1) < 0.3 < (1 + 4) / (10 + 4)  # both branches were taken
    assert_close(average.average("net.a"), expected)
    before = w["net.a"].detach().clone()
    with average.swapped(w):
        assert_close(w["net.a"].detach(), expected)
    assert torch.equal(w["net.a"], before)


def test_half_precision_weights_have_exact_averages():
    w = {"a": nn.Parameter(torch.ones(2, dtype=torch.bfloat16))}
    average = WeightAverage(w, 0.9999)
    assert average.average("a").dtype == torch.float32
    assert set(average.state_dict()) == {"a", "steps"}


@pytest.mark.fault("video V24")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_averages_stay_exact_in_a_module_of_half_precision(dtype):
    """Lightning casts the whole module after it was built; 1 % of a step is lost to bfloat16."""
    module = nn.Module()
    module.w = nn.Parameter(torch.ones(2))
    module.kept = WeightAverage({"w": module.w}, 0.9999)
    module.to(dtype)
    assert module.w.dtype == dtype
    module.kept.steps.fill_(100_000)
    with torch.no_grad():
        module.w += 1
    module.kept.update({"w": module.w})
    assert_close(module.kept.average("w"), torch.full((2,), 1.0001))


def test_decay_is_checked():
    with pytest.raises(ValueError, match=r"ema must lie in \[0, 1\), got 1"):
        WeightAverage({}, 1.0)
