import pytest
import torch

from benchmarks import endoscopy
from benchmarks.comparison import load_head
from benchmarks.endoscopy import CASES, _Training


@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: case.preset)
def test_every_variant_is_a_step_of_training(case, monkeypatch):
    made = []

    class Recorded(_Training):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr(endoscopy, "_Training", Recorded)
    small = case._replace(batch=2)
    calls = endoscopy.gradient_routing(small).build(load_head)
    assert list(calls) == ["plain step", "joint", "dual", "reference", "plain step without gates"]
    states = []
    for training, call in zip(made, calls.values(), strict=True):
        before = {name: p.detach().clone() for name, p in training.model.named_parameters()}
        call()
        after = dict(training.model.named_parameters())
        assert any(not torch.equal(before[name], p) for name, p in after.items())
        assert all(not torch.equal(before[n], p) for n, p in after.items() if n.endswith("logits"))
        states.append({name: p.detach().clone() for name, p in after.items()})
    weight = next(name for name in states[0] if name.endswith("conv1.weight") or "patch" in name)
    assert torch.allclose(states[0][weight], states[1][weight], atol=1e-6)  # plain and joint
