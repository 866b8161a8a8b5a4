"""Gradients of what a task must not touch are exactly zero, over random forests of groups."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.models import build
from recsys.models.home import HoME
from recsys.schema import Task

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
                moved = {owner[e] for e in range(len(owner)) if p.grad[e].any()}
                assert moved <= {task, number}
        (first, *_) = experts.weights
        assert {owner[e] for e in range(len(owner)) if first.grad[e].any()} == {task, number}
