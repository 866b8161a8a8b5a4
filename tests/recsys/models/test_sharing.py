"""Which experts, gates and towers a task moves, and what tasks share."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.models import MODELS, build
from recsys.models.home import HoME
from recsys.models.net import gates_where, mixture, rows_where
from recsys.ranker import Ranker
from recsys.schema import FeatureSchema, History, Sparse, Task

INPUTS, ROWS = 4, 6


@st.composite
def forests(draw):
    """Tasks in categories, and numbers of experts for some of the groups."""
    categories = draw(st.lists(st.sampled_from("abcd"), min_size=1, max_size=5))
    tasks = [Task(f"t{t}", category=c) for t, c in enumerate(categories)]
    names = sorted(set(categories))

    def counts(groups):
        return {g: draw(st.integers(1, 3)) for g in groups if draw(st.booleans())}

    return tasks, {
        "meta_experts": counts([*names, "shared"]),
        "task_experts": counts([*(t.name for t in tasks), *names, "shared"]),
        "rank": (draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        "self_gate": draw(st.booleans()),
        "feature_gate": draw(st.booleans()),
        "norm": draw(st.sampled_from(["batch", "none"])),
        "layer2_shared_input": draw(st.sampled_from(["per_category", "shared_only"])),
    }


def randomized(net, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.data.copy_(0.5 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return net


def made(tasks, options):
    options = {**options, "dim": 2, "hidden_dims": (3,), "tower_dims": (2,)}
    net = HoME(INPUTS, tasks, **options, activation="silu", dtype=torch.float64)
    v = torch.randn(ROWS, INPUTS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return randomized(net), v


def groups_with_gradient(layer):
    """Groups some of whose experts, or whose feature gate, got a gradient that is not zero."""
    touched = set()
    for e, group in enumerate(layer.owner):
        if any(bool(p.grad[e].any()) for p in layer.experts.parameters()):
            touched.add(group)
    if layer.feature_gates is not None:
        for g, group in enumerate(dict.fromkeys(layer.owner)):
            if any(bool(p.grad[g].any()) for p in layer.feature_gates.parameters()):
                touched.add(group)
    return touched


def gates_with_gradient(mixture):
    """Numbers of the gates whose rows got a gradient."""
    place = mixture.tables.nonzero()[:, 1]
    moved = [p.grad.view(len(place), -1).any(1) for p in mixture.parameters()]
    return {int(g) for g in place[torch.stack(moved).any(0)]}


@settings(max_examples=50)
@given(forests())
def test_a_task_moves_its_own_groups_gates_and_tower(forest):
    tasks, options = forest
    net, v = made(tasks, options)
    logits = net(v)
    names = net.forest.task_names
    for column, task in enumerate(tasks):
        net.zero_grad(set_to_none=False)
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        logits[:, column].square().sum().backward(retain_graph=True)
        assert groups_with_gradient(net.task_layer) == {task.name, task.category, "shared"}
        place = names.index(task.name)
        assert gates_with_gradient(net.task_layer.mixture) == {place}
        for p in net.towers.parameters():
            assert {t for t in range(len(tasks)) if p.grad[t].any()} <= {place}
        assert net.towers.weight.grad[place].any()


@settings(max_examples=50)
@given(forests())
def test_a_category_of_the_first_layer_moves_its_own_experts_and_shared_ones(forest):
    tasks, options = forest
    net, v = made(tasks, options)
    z = net.meta_layer(v)
    groups = net.forest.meta_groups
    for number, group in enumerate(groups):
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        z[:, number].square().sum().backward(retain_graph=True)
        seen = set(groups) if group == "shared" else {group, "shared"}
        assert groups_with_gradient(net.meta_layer) == seen
        assert gates_with_gradient(net.meta_layer.mixture) == {number}


@pytest.mark.parametrize("name", ["CGC", "PLE"])
@settings(max_examples=40)
@given(data=st.data())
def test_a_task_moves_no_task_expert_of_others_at_the_last_level(name, data):
    number = data.draw(st.integers(2, 5))
    options = {
        "num_task_experts": data.draw(st.integers(1, 3)),
        "num_shared_experts": data.draw(st.integers(1, 3)),
        "norm": data.draw(st.sampled_from(["batch", None])),
        "activation": "silu",
        "dim": 3, "hidden_dims": [4], "tower_dims": [2],
    }  # fmt: skip
    net = randomized(build(name, options, INPUTS, [Task(f"t{t}") for t in range(number)]).double())
    v = torch.randn(ROWS, INPUTS, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    logits = net(v)
    experts = net.layers[-1].experts
    owner = [g for g, count in enumerate(experts.counts) for _ in range(count)]
    for task in range(number):
        net.zero_grad()
        logits[:, task].square().sum().backward(retain_graph=True)
        for p in experts.parameters():
            if len(p) == len(owner):
                assert {owner[e] for e in range(len(owner)) if p.grad[e].any()} <= {task, number}
        (first, *_) = experts.weights
        assert {owner[e] for e in range(len(owner)) if first.grad[e].any()} == {task, number}


TASKS = [Task("a", category="w"), Task("b", category="i"), Task("c", category="w")]
HOME = [
    {"layer2_shared_input": "shared_only"},
    {"meta_experts": {"w": 2}, "task_experts": {"w": 3, "a": 2, "shared": 2}},
    {"mask": False, "self_gate": False},
    {"feature_gate": False},
]
CASES = [
    *((name, {}) for name in sorted(set(MODELS) - {"Linear", "WideAndDeep"})),
    ("OMoE", {"gate": "NoisyTopKGate", "gate_options": {"k": 8}}),
    ("OMoE", {"gate_dims": [4], "gate_norm": "batch"}),
    ("SingleTask", {"own_embeddings": True}),
    *(("PLE", {"levels": levels}) for levels in (1, 3, 4)),
    ("PLE", {"levels": 3, "gate_dims": [4], "gate_norm": "batch", "num_shared_experts": 2}),
    ("PLE", {"num_task_experts": 2}),
    *(("AdaTT", {"num_task_experts": 2, "levels": n, "num_shared_experts": 1}) for n in (1, 3)),
    *(("HoME", options) for options in HOME),
]


def tasks_of(net, parameters, logits):
    """Return for each element of the parameters how many tasks send it a gradient."""
    counts = []
    grads = [
        torch.autograd.grad(
            logits[:, task].square().sum(), parameters, retain_graph=True, allow_unused=True
        )
        for task in range(3)
    ]
    for parameter, *found in zip(parameters, *grads, strict=True):
        moved = [torch.zeros_like(parameter) if g is None else g for g in found]
        counts.append(sum((g.abs() > 1e-9).int() for g in moved))
    return counts


def named(parts, parameters):
    """Return for each element of the parameters in how many of the parts it lies."""
    inside = {id(parameter): torch.zeros_like(parameter).int() for parameter in parameters}
    for parameter, rows in parts:
        inside[id(parameter)][rows] += 1
    return [inside[id(parameter)] for parameter in parameters]


@pytest.mark.fault("video R6")
@pytest.mark.parametrize("norm", [None, "batch"])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_what_gets_gradients_of_two_tasks_is_shared(name, options, norm):
    """Exactly that, in training; a bias before a normalization has no gradient."""
    torch.manual_seed(0)
    small = {"dim": 6, "hidden_dims": [5], "tower_dims": [4], "activation": "silu"}
    net = build(name, {**small, "norm": norm, **options}, 10, TASKS).double()
    parameters = list(net.parameters())
    for parameter in parameters:
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    v = torch.randn(64, net.copies, 10) if net.copies > 1 else torch.randn(64, 10)
    counts = tasks_of(net, parameters, net(v.double()))
    inside = named(net.all_shared(), parameters)
    for (label, _), count, times in zip(net.named_parameters(), counts, inside, strict=True):
        assert times.max() <= 1 if times.numel() else True, f"{label} is named twice"
        assert times[count >= 2].all(), f"{label} is shared, but not named"
        if "biases" not in label and "bias" not in label.rpartition(".")[2]:
            assert (count >= 2)[times.bool()].all(), f"{label} is named, but not shared"


SCHEMA = FeatureSchema(
    tasks=tuple(TASKS),
    sparse=(Sparse("user", side="user"), Sparse("item", side="item")),
    sequences=(History("past", of="item", encoder="target_attention"),),
    dim=4,
)


@pytest.mark.fault("video R6")
@pytest.mark.parametrize(
    ("name", "options", "number"),
    [
        ("SharedBottom", {}, 1),
        ("SingleTask", {}, 1),
        ("SingleTask", {"own_embeddings": True}, 0),
    ],
)
def test_encoders_of_several_tasks_are_shared(name, options, number):
    torch.manual_seed(0)
    small = {"dim": 6, "hidden_dims": [5], "tower_dims": [4], "activation": "silu"}
    ranker = Ranker.build(SCHEMA, {"user": 9, "item": 9}, 0, name, {**small, **options})
    rows = torch.randint(2, 9, (16, 2)), torch.zeros(16, 0), (torch.randint(2, 9, (16, 5)),)
    for table in ranker.tables():
        table.data.normal_()
    parameters = [p for layer in ranker.input_layers for p in layer.encoders.parameters()]
    counts = tasks_of(ranker, parameters, ranker(*rows))
    shared = {id(parameter) for parameter, _ in ranker.all_shared()}
    found = [id(parameter) in shared for parameter in parameters]
    assert found == [bool((count >= 2).any()) for count in counts]
    assert sum(found) == number * len(parameters) // len(ranker.layers)


def test_rows_next_to_each_other_are_one_stretch():
    parameter = torch.nn.Parameter(torch.arange(6.0))
    found = rows_where([parameter], [True, True, False, True, False, True])
    assert [rows for _, rows in found] == [slice(0, 2), slice(3, 4), slice(5, 6)]
    assert rows_where([parameter], [False] * 6) == []


def test_rows_of_a_gate_are_those_that_make_its_weights():
    """In a mixture whose gates see unlike numbers of experts, with hidden layers."""
    mask = torch.tensor([[True, False, True], [True, True, True], [False, True, False]])
    made = mixture(4, mask, hidden_dims=[5], norm="batch").double()
    x = torch.randn(8, 4).double()
    chosen = torch.randn(8, 3).double() * mask[1]
    total = (made.weights(x)[:, 1] * chosen).sum()
    parameters = dict(made.named_parameters())
    grads = torch.autograd.grad(total, list(parameters.values()))
    inside = named(gates_where(made, [False, True, False]), parameters.values())
    for (label, parameter), grad, times in zip(parameters.items(), grads, inside, strict=True):
        assert 0 < times.sum() < parameter.numel(), label
        assert times[grad.abs() > 1e-12].all(), label
        if "weight" in label:
            assert torch.equal(grad.abs() > 1e-12, times > 0), label
