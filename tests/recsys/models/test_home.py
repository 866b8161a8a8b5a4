"""HoME against golden vectors of an independent derivation, and by its properties."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from recsys.models.home import HoME
from recsys.schema import Task

GOLDEN = Path(__file__).parents[2] / "golden" / "recsys"
STATISTICS = {"weight": "gamma", "bias": "beta", "running_mean": "mean", "running_var": "var"}
GATES = {"mixer_weight": "Wg", "mixer_bias": "bg", "down": "B", "up": "A"}


def tasks_of(*categories):
    """Tasks t0, t1, … of the given categories."""
    return [Task(f"t{t}", category=category) for t, category in enumerate(categories)]


def drawn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def randomized(net, seed=3):
    """The network with every parameter and statistic away from where it starts."""
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.data.copy_(0.5 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    for name, b in net.named_buffers():
        if "running" in name:
            b.copy_(0.5 + torch.rand(b.shape, generator=generator, dtype=torch.float64))
    return net


@pytest.fixture(params=["home_a", "home_b"])
def arrays(request):
    with np.load(GOLDEN / f"{request.param}.npz") as found:
        text = {k: v.tolist() for k, v in found.items() if v.dtype.kind == "U"}
        return text | {k: torch.from_numpy(found[k]) for k in found if k not in text}


def network_of(arrays):
    """A HoME of the sizes and with the weights of golden vectors."""
    config = json.loads(arrays["config"])
    cats, p = config["cats"], lambda name: arrays[f"param/{name}"]
    tasks = tasks_of(*config["task_cat"])

    def number(layer, group):
        return sum(f"param/{layer}.exp.{group}.{i}.0.W" in arrays for i in range(9))

    def layers(prefix):
        return [f"param/{prefix}.{j}.W" for j in range(9) if f"param/{prefix}.{j}.W" in arrays]

    meta = {g: number("l1", g) for g in (*cats, "shared")}
    task = {g: number("l2", g) for g in (*(t.name for t in tasks), *cats, "shared")}
    widths = [len(arrays[name]) for name in layers("l1.exp.shared.0")]
    net = HoME(
        arrays["v"].shape[1],
        tasks,
        dim=widths[-1],
        hidden_dims=widths[:-1],
        meta_experts=meta,
        task_experts=task,
        num_maps=len(p("l1.fea.shared.B")),
        rank=[p(f"l{i}.fea.shared.B").shape[2] for i in (1, 2)],
        tower_dims=[len(arrays[name]) for name in layers("tower.t0")[:-1]],
        dtype=torch.float64,
    )
    assert list(net.forest.categories) == cats
    for prefix, layer, groups in (
        ("l1", net.meta, net.forest.meta_groups),
        ("l2", net.task, net.forest.task_groups),
    ):
        for g, group in enumerate(groups):
            state = {key: p(f"{prefix}.fea.{group}.{name}") for key, name in GATES.items()}
            layer.feature_gates.load_gate(g, state)
        load_experts(layer, prefix, p)
    load_mixtures(net, cats, p)
    load_towers(net, p, len(layers("tower.t0")))
    return net


def expert_names(layer, prefix):
    owner = layer.owner
    return [f"{prefix}.exp.{g}.{owner[:e].count(g)}" for e, g in enumerate(owner)]


def load_experts(layer, prefix, p):
    state = layer.experts.state_dict()
    for e, name in enumerate(expert_names(layer, prefix)):
        for j in range(len(layer.experts.weights)):
            state[f"weights.{j}"][e] = p(f"{name}.{j}.W")
            state[f"biases.{j}"][e] = p(f"{name}.{j}.b")
            for key, part in STATISTICS.items():
                state[f"norms.{j}.{key}"][e] = p(f"{name}.{j}.bn.{part}")


def load_mixtures(net, cats, p):
    """Rows of a mixture follow its columns; those of the vectors put own experts first."""

    def load(mixture, prefix, groups, owner, order):
        parts = {"W": [], "b": []}
        for kind, table in zip(("gate", "self"), mixture.tables, strict=True):
            for group, row in zip(groups, table, strict=True):
                mine = [owner[e] for e in row.nonzero().flatten()]
                theirs = order(group) if kind == "gate" else [group]
                theirs = [g for g in theirs for _ in range(mine.count(g))]
                slots = [theirs.index(g) + mine[:i].count(g) for i, g in enumerate(mine)]
                for name, rows in parts.items():
                    rows.append(p(f"{prefix}.{kind}.{group}.{name}")[slots])
        mixture.load_state_dict({"weight": torch.cat(parts["W"]), "bias": torch.cat(parts["b"])})

    forest = net.forest
    load(
        net.meta.mixture,
        "l1",
        forest.meta_groups,
        net.meta.owner,
        lambda g: [*cats, "shared"] if g == "shared" else [g, "shared"],
    )
    owner = [net.task.owner[e] for e in net.task.experts.expert_of_output]
    category = {t: cats[forest.category_of(t)] for t in forest.task_names}
    load(
        net.task.mixture,
        "l2",
        forest.task_names,
        owner,
        lambda g: [g, category[g], "shared"],
    )


def load_towers(net, p, number):
    for t, task in enumerate(net.forest.task_names):
        for j in range(number - 1):
            net.towers.hidden.weights[j].data[t] = p(f"tower.{task}.{j}.W")
            net.towers.hidden.biases[j].data[t] = p(f"tower.{task}.{j}.b")
        net.towers.weight.data[t] = p(f"tower.{task}.{number - 1}.W")[0]
        net.towers.bias.data[t] = p(f"tower.{task}.{number - 1}.b")[0]


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_golden(mode, arrays):
    net = network_of(arrays).train(mode == "train")
    v = arrays["v"].requires_grad_()
    z = net.meta(v)
    for group, found in zip(net.forest.meta_groups, z.unbind(1), strict=True):
        assert_close(found, arrays[f"{mode}/z1.{group}"], rtol=0, atol=1e-10)
    h = net.task(net._task_inputs(z))
    for task, found in zip(net.forest.task_names, h.unbind(1), strict=True):
        assert_close(found, arrays[f"{mode}/h2.{task}"], rtol=0, atol=1e-10)
    logits = network_of(arrays).train(mode == "train")(v)
    assert_close(logits, arrays[f"logits_{mode}"], rtol=0, atol=1e-10)
    (grad,) = torch.autograd.grad((arrays["loss_weight"] * logits).sum(), v)
    assert_close(grad, arrays[f"grad_v_{mode}"], rtol=0, atol=1e-8)  # central differences
    assert_close(net.eval().folded()(v), net(v), rtol=0, atol=1e-10)


def test_golden_running_statistics(arrays):
    net = network_of(arrays)
    net(arrays["v"])
    compared = 0
    for prefix, layer in (("l1", net.meta), ("l2", net.task)):
        for e, name in enumerate(expert_names(layer, prefix)):
            for j, norm in enumerate(layer.experts.norms):
                for key, part in (("running_mean", "new_mean"), ("running_var", "new_var")):
                    expected = arrays[f"after_train/{name}.{j}.bn.{part}"]
                    assert_close(getattr(norm, key)[e], expected, rtol=0, atol=1e-10)
                    compared += 1
    assert compared == sum(key.startswith("after_train/") for key in arrays)
