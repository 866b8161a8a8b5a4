"""A linear model with a network on top, which starts as the linear model."""

import polars as pl
import pytest
import torch
from torch.testing import assert_close

from core_gates.errors import GatesError
from recsys.model_folder import load_model, save_model
from recsys.models import build
from recsys.ranker import Ranker
from recsys.ranker_module import MultiTaskModule
from recsys.schema import FeatureSchema, Product, Sparse, Task, Threshold
from recsys.transform import FeatureTransform

SMALL = {"dim": 5, "hidden_dims": [6], "tower_dims": [4]}
DEEP = {
    "home": {"deep": "HoME", "deep_options": {**SMALL, "rank": 2}},
    "mmoe": {"deep": "MMoE", "deep_options": {**SMALL, "norm": "batch"}},
    "own tables": {"deep": "SingleTask", "deep_options": {**SMALL, "own_embeddings": True}},
    "by identity": {
        "deep": "MMoE",
        "deep_options": {
            **SMALL, "gate": "HashGate", "gate_options": {"num_ids": 9, "k": 1},
            "gate_feature": "item",
        },
    },
}  # fmt: skip
SCHEMA = FeatureSchema(
    tasks=(Task("like"), Task("long", threshold=Threshold("play", 0.5))),
    regressions=(Task("play", kind="regression"),),
    sparse=(Sparse("user", dim=3, side="user"), Sparse("item", dim=3)),
    products=(Product("user", "item"),),
)
SIZES = {"user": 6, "item": 9}


def ranker(net, **options):
    made = Ranker.build(SCHEMA, SIZES, 0, net, options).eval()
    with torch.no_grad():
        for parameter in made.parameters() if net == "Linear" else ():
            parameter.add_(torch.randn_like(parameter))
    return made


def rows(number=40):
    drawn = [torch.randint(SIZES[name], (number,)) for name in ("user", "item")]
    return torch.stack(drawn, 1), torch.zeros(number, 0)


@pytest.mark.parametrize("deep", DEEP)
def test_it_starts_as_a_trained_linear_and_leaves_it(deep):
    torch.manual_seed(0)
    other, made, batch = ranker("Linear"), ranker("WideAndDeep", **DEEP[deep]), rows()
    assert not torch.allclose(made(*batch), other(*batch), atol=0.1)
    made.start_from(other)
    assert_close(made(*batch), other(*batch), rtol=0, atol=1e-6)
    optimizer = torch.optim.SGD(made.net.parameters(), lr=0.1)
    towers = {id(p) for name, p in made.net.deep.named_parameters() if "towers" in name}
    below = [p for p in made.net.deep.parameters() if id(p) not in towers]
    for step in range(2):  # zero towers pass no gradient to what is below at first
        optimizer.zero_grad()
        made.train()(*batch).square().mean().backward()
        assert any(p.grad is not None and p.grad.any() for p in below) == (step > 0)
        optimizer.step()
    made.eval()
    v, ids = made.inputs(*batch), made.ids(batch[0])
    first = v if v.ndim == 2 else v[:, 0]
    deeper = made.net.deep(v, None, ids)
    assert_close(made.outputs(v, ids), made.net.linear(first) + deeper)
    assert deeper.abs().max() > 1e-3
    expected = made(*batch)  # up to a thousand, where float32 has steps of 1e-4
    assert_close(made.folded()(*batch), expected, rtol=2e-7, atol=1e-5)


def test_a_linear_starts_from_a_linear_with_its_average_and_is_saved(tmp_path):
    torch.manual_seed(0)
    schema = FeatureSchema(tasks=(Task("like"),), sparse=(Sparse("user", dim=3),))
    transform = FeatureTransform(schema).fit(pl.DataFrame({"user": ["a", "b", "c"]}))
    other = Ranker.build(schema, transform.sizes, 0, "Linear")
    with torch.no_grad():
        other.net.linear.weight.add_(1.0)
    for net, options in (("Linear", {}), ("WideAndDeep", DEEP["mmoe"])):
        module = MultiTaskModule(net, dict(options), ema=0.9)
        made = module.build(transform, other).eval()
        served = module.served()
        batch = (torch.tensor([[2], [3]]), torch.zeros(2, 0))
        assert_close(served(*batch), other(*batch))
        folder = save_model(tmp_path / net, made, transform)
        assert_close(load_model(folder).ranker(*batch), other(*batch))


def test_what_the_deep_network_says_of_itself():
    net = build("WideAndDeep", DEEP["mmoe"], 8, [Task("a"), Task("b")])
    assert len(net.expert_layers()) == 1
    assert {id(p) for p, _ in net.all_shared()} == {id(p) for p, _ in net.deep.all_shared()}
    own = build("WideAndDeep", DEEP["own tables"], 8, [Task("a"), Task("b")])
    assert (own.copies, list(own.shared_copies)) == (2, [0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"deep": "Hom"}, "there is no network 'Hom'"),
        ({"deep": "MMoE", "deep_options": {"dims": 3}}, "MMoE has no option 'dims'"),
        ({"deep": "Linear"}, "Linear cannot be deep"),
        ({"deep": "WideAndDeep", "deep_options": {"deep": "MMoE"}}, "WideAndDeep cannot be deep"),
        ({"deep": 3}, "deep is 3 with None, expected a name"),
        ({"deep": "MMoE", "deep_options": [1]}, "expected a name and a mapping"),
    ],
)
def test_mistakes_are_one_line(options, message):
    with pytest.raises(GatesError, match=message) as found:
        build("WideAndDeep", options, 8, [Task("a")])
    assert "\n" not in str(found.value)


def test_what_cannot_start_is_refused():
    other, wide = ranker("Linear"), ranker("WideAndDeep", **DEEP["mmoe"])
    pairs = [(ranker("MMoE", **SMALL), other, "MMoE cannot start from Linear")]
    pairs += [(wide, ranker("WideAndDeep", **DEEP["mmoe"]), "start from WideAndDeep: Linear and")]
    large = Ranker.build(SCHEMA, {**SIZES, "item": 12}, 0, "WideAndDeep", DEEP["mmoe"])
    for made, first, message in [*pairs, (large, other, "another schema or other tables")]:
        with pytest.raises(GatesError, match=message) as found:
            made.start_from(first)
        assert "\n" not in str(found.value)
