"""HoME against golden vectors of an independent derivation, and by its properties."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from core_gates.moe.normed_experts import ExpertNorm
from recsys import HoME, Task

GOLDEN = Path(__file__).parents[2] / "golden" / "recsys"
STATISTICS = {"weight": "gamma", "bias": "beta", "running_mean": "mean", "running_var": "var"}
GATES = {"mixer_weight": "Wg", "mixer_bias": "bg", "down": "B", "up": "A"}


def tasks_of(*categories):
    """Tasks t0, t1, … of the given categories."""
    return [Task(f"t{t}", category=category) for t, category in enumerate(categories)]


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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
        ("l1", net.meta_layer, net.forest.meta_groups),
        ("l2", net.task_layer, net.forest.task_groups),
    ):
        for g, group in enumerate(groups):
            for key, name in GATES.items():
                values = p(f"{prefix}.fea.{group}.{name}")
                target = layer.feature_gates.get_parameter(key).data[g]
                target.copy_(values.mT if key == "down" else values)
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
        net.meta_layer.mixture,
        "l1",
        forest.meta_groups,
        net.meta_layer.owner,
        lambda g: [*cats, "shared"] if g == "shared" else [g, "shared"],
    )
    owner = [net.task_layer.owner[e] for e in net.task_layer.experts.expert_of_output]
    category = {t: cats[forest.category_of(t)] for t in forest.task_names}
    load(
        net.task_layer.mixture,
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
    z = net.meta_layer(v)
    for group, found in zip(net.forest.meta_groups, z.unbind(1), strict=True):
        assert_close(found, arrays[f"{mode}/z1.{group}"], rtol=0, atol=1e-10)
    h = net.task_layer(net._task_inputs(z))
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
    for prefix, layer in (("l1", net.meta_layer), ("l2", net.task_layer)):
        for e, name in enumerate(expert_names(layer, prefix)):
            for j, norm in enumerate(layer.experts.norms):
                for key, part in (("running_mean", "new_mean"), ("running_var", "new_var")):
                    expected = arrays[f"after_train/{name}.{j}.bn.{part}"]
                    assert_close(getattr(norm, key)[e], expected, rtol=0, atol=1e-10)
                    compared += 1
    assert compared == sum(key.startswith("after_train/") for key in arrays)


SMALL = {"tower_dims": (2,), "dtype": torch.float64}


def test_without_the_mask_every_gate_sees_all():
    net = randomized(HoME(4, tasks_of("a", "b", "b"), dim=2, hidden_dims=(3,), mask=False, **SMALL))
    assert (net.task_layer.mixture.weights(net._task_inputs(net.meta_layer(drawn(5, 4)))) > 0).all()


def test_closed_feature_gates_change_nothing_exactly():
    options = {"dim": 4, "hidden_dims": (6,), "tower_dims": (3,)}
    net = HoME(5, tasks_of("a", "b", "b"), **options)
    plain = HoME(5, tasks_of("a", "b", "b"), feature_gate=False, **options)
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if "feature_gates" not in k})
    v = drawn(6, 5).float()
    assert torch.equal(net.meta_layer.feature_gates(v), v.unsqueeze(1).expand(-1, 3, -1))
    assert_close(net(v), plain(v), rtol=0, atol=1e-6)
    net.meta_layer.feature_gates.up.data.fill_(1)
    assert not torch.allclose(net(v), plain(v), atol=1e-3)


def test_tasks_come_back_in_their_order_whatever_their_categories():
    mixed, sorted_ = tasks_of("b", "a", "b"), [Task("t0", category="b"), Task("t2", category="b")]
    nets = [
        HoME(4, order, dim=2, **SMALL) for order in (mixed, [*sorted_, Task("t1", category="a")])
    ]
    randomized(nets[0])
    nets[1].load_state_dict(nets[0].state_dict())
    v = drawn(5, 4)
    assert_close(nets[0](v), nets[1](v)[:, [0, 2, 1]])


def test_sizes_and_work_at_the_widths_of_the_specification():
    """7.04 MFLOP in the specification count the first layer's feature gates once per expert."""
    tasks = tasks_of(*["watch"] * 6, *["interaction"] * 6)
    net = HoME(464, tasks, **{"dim": 128, "hidden_dims": (256,), "rank": 32, "tower_dims": (64,)})
    assert sum(p.numel() for p in net.parameters()) == 3_209_748
    with FlopCounterMode(display=False) as counter:
        net(torch.zeros(2, 464))
    again = 3 * (2 * 464 * 2 * 32 + 464 * 2)  # what the second expert of a group would repeat
    mixing = 2 * 464 * 3 + 2 * 256 * 16 + 128 * (20 + 48)
    total = counter.get_total_flops() / 2 / 2
    assert 3.20e6 < total < 3.32e6
    assert abs(2 * (total + again + mixing) / 7.04e6 - 1) < 0.03


@pytest.mark.parametrize("shared_input", ["per_category", "shared_only"])
def test_folded_networks_and_what_diagnosis_reads(shared_input):
    options = {"layer2_shared_input": shared_input, "task_experts": {"shared": 2}}
    net = randomized(HoME(4, tasks_of("a", "b", "b"), dim=2, **options, **SMALL))
    net.train()(drawn(9, 4))
    folded, v = net.folded(), drawn(5, 4)
    assert not any(isinstance(module, ExpertNorm) for module in folded.modules())
    assert_close(folded(v), net.eval()(v), rtol=1e-10, atol=1e-10)
    assert any(isinstance(module, ExpertNorm) for module in net.modules())
    for described, layer in zip(net.expert_layers(), (net.meta_layer, net.task_layer), strict=True):
        assert described.experts is layer.experts
        assert described.mixture is layer.mixture
        assert len(described.expert_names) == layer.experts.num_experts
        assert all(len(p) == layer.experts.num_experts for p in layer.experts.parameters())
    weights = net.task_layer.mixture.weights(net._task_inputs(net.meta_layer(v)))
    assert weights.shape == (5, 3, net.task_layer.experts.num_experts)
    assert_close(weights.sum(-1), torch.ones(5, 3, dtype=torch.float64))
    last = net.expert_layers()[1]
    assert last.gate_names == ("t0", "t1", "t2")
    assert last.expert_groups == ("t0", "a", "t1", "t2", "b", "shared", "shared")
    assert last.expert_names[-1] == "shared 1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task_experts": {"tx": 2}}, "task_experts names 'tx'; the groups are t0, a, t1, b"),
        ({"meta_experts": {"t0": 2}}, "meta_experts names 't0'; the groups are a, b, shared"),
        ({"meta_experts": 0}, r"meta_experts\['a'\] must be at least 1, got 0"),
        ({"rank": (2, 2, 2)}, "rank must be one for both layers or one for each"),
        ({"rank": "paper", "num_maps": 3}, "3 does not divide 4"),
        ({"norm": "layer"}, "choose one of batch, none"),
        ({"layer2_shared_input": "both"}, "choose one of per_category, shared_only"),
        ({"dim": 0}, "dim must be at least 1, got 0"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        HoME(4, tasks_of("a", "b"), **options)


def test_names_of_groups_are_distinct(refuses):
    refuses(
        ValueError,
        ("'like' name two groups", lambda: HoME(4, [Task("like", category="like")])),
        ("'shared' name two groups", lambda: HoME(4, [Task("shared")])),
    )


def test_a_single_row_cannot_be_normalized_in_training():
    net = HoME(4, tasks_of("a", "b"))
    with pytest.raises(ValueError, match="more than 1 row in training, got a batch of 1"):
        net(torch.zeros(1, 4))
    assert net.eval()(torch.zeros(1, 4)).shape == (1, 2)


@pytest.mark.costly("the compiler and the exporter trace a network")
def test_the_meta_device_and_a_compiled_network():
    options = {"dim": 4, "hidden_dims": (), "rank": 2}
    assert all(
        p.is_meta for p in HoME(4, tasks_of("a", "b"), **options, device="meta").parameters()
    )
    net = HoME(4, tasks_of("a", "b"), **options).eval()
    v = drawn(6, 4).float()
    assert_close(torch.compile(net, backend="eager", fullgraph=True)(v), net(v))
    shapes = {"v": {0: torch.export.Dim("rows", min=1)}}
    exported = torch.export.export(net, (v,), dynamic_shapes=shapes)
    for rows in (1, 37):
        v = drawn(rows, 4).float()
        assert_close(exported.module()(v), net(v), rtol=1e-5, atol=1e-5)
