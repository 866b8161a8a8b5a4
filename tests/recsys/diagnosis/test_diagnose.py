import math

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn

from core_gates import GatesError, MaskedMixture, NormedExperts
from recsys import MMoE, Task
from recsys.diagnosis import ExpertReport, Rows, diagnose, permutation_importance
from recsys.metrics import user_resamples
from recsys.models import MODELS, ExpertLayer, MultiTaskNet, build


class Toy(MultiTaskNet):
    """CGC: own and shared experts for each task, one logit each."""

    def __init__(self, tasks=3, dim=5, *, self_gates=False, experts=None, mask=None):
        names = [f"t{t}" for t in range(tasks)]
        super().__init__(dim, [Task(name) for name in names])
        self.groups = (*names, "shared", "shared")
        own = torch.tensor([[g == n for g in self.groups] for n in names])
        seen = own | torch.tensor([g == "shared" for g in self.groups])
        self.experts = experts or NormedExperts(len(self.groups), dim, [6, 4])
        self.mixture = MaskedMixture(
            dim, seen if mask is None else mask, self_mask=own if self_gates else None
        )
        self.towers = nn.Parameter(torch.randn(tasks, 4))

    def forward(self, v, prior=None):
        return (self.mixture(v, self.experts(v)) * self.towers).sum(-1)

    def expert_layers(self):
        names = tuple(f"{group} {e}" for e, group in enumerate(self.groups))
        tasks = tuple(task.name for task in self.tasks)
        return [ExpertLayer("layer 1", self.experts, self.mixture, names, self.groups, tasks)]


class Plain(MultiTaskNet):
    """No experts at all."""

    def __init__(self):
        super().__init__(5, [Task("a")])
        self.linear = nn.Linear(5, 1)

    def forward(self, v, prior=None):
        return self.linear(v)


class Scaled(nn.Module):
    """Experts whose outputs are known: row sums through ReLU, times a factor per expert."""

    def __init__(self, factors, features):
        super().__init__()
        self.factors = nn.Parameter(torch.tensor(factors))
        self.features = features

    def forward(self, v):
        return self.factors[:, None] * v[:, None, : self.features].relu()


def rows(number=64, tasks=3, dim=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(number, dim, generator=generator)
    labels = (torch.rand(number, tasks, generator=generator) < 0.4).float()
    return Rows(v, labels, torch.ones(number, tasks, dtype=torch.bool), torch.ones(number))


def toy(**options):
    torch.manual_seed(0)
    net = Toy(**options)
    with torch.no_grad():
        for buffer in net.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5)
    return net


def test_activations_have_their_closed_forms():
    batch = rows(4000)
    layer = diagnose(toy(experts=Scaled([1.0, 2, 10, 0, -1], 4)), [batch]).layer("layer 1")
    outputs = batch.v[:, :4].relu().double()
    assert layer.zero_rate[:3] == pytest.approx([float((outputs == 0).double().mean())] * 3)
    assert layer.zero_rate[3] == 1
    std = float(outputs.std(correction=0))
    assert layer.std == pytest.approx([std, 2 * std, 10 * std, 0, std])
    assert layer.mean[4] == pytest.approx(-float(outputs.mean()))
    assert layer.near_zero_rate[0] == pytest.approx(float((outputs < 0.05 * std).double().mean()))
    assert layer.effective_rank[:3] == pytest.approx([4] * 3, rel=0.01)
    assert (layer.effective_rank[3], layer.scale_ratio) == (0, math.inf)


def test_the_effective_rank_counts_independent_features():
    batch = rows(2000, dim=4)
    flat = batch._replace(v=batch.v[:, :1].expand(-1, 4))
    net = toy(dim=4, experts=Scaled([1.0] * 5, 4))
    assert diagnose(net, [flat]).layers[0].effective_rank == pytest.approx([1] * 5, abs=1e-6)


def test_gates_have_their_closed_forms():
    net = toy()
    with torch.no_grad():
        net.mixture.weight.zero_()
        # visible experts of each gate: own, shared 3, shared 4
        net.mixture.bias.copy_(torch.tensor([8.0, 1, 1, 2, 2, 2, 1, 3, 1]).log())
    layer = diagnose(net, [rows()], gradients=False).layers[0]
    expected = np.array([[0.8, 0, 0, 0.1, 0.1], [0, 1 / 3, 0, 1 / 3, 1 / 3], [0, 0, 0.2, 0.6, 0.2]])
    np.testing.assert_allclose(layer.weights, expected, atol=1e-6)
    np.testing.assert_array_equal(layer.visible, expected > 0)
    assert layer.largest.tolist() == pytest.approx([0.8, 1 / 3, 0.6], abs=1e-6)
    assert layer.entropy[1] == pytest.approx(math.log(3), abs=1e-6)
    assert layer.row_entropy.tolist() == pytest.approx(layer.entropy.tolist(), abs=1e-6)
    assert layer.shared.tolist() == [False] * 3 + [True] * 2
    total = 0.1 + 1 / 3 + 0.6
    assert layer.occupancy[:, 3] == pytest.approx([0.1 / total, 1 / 3 / total, 0.6 / total])
    assert np.isnan(layer.occupancy[:, :3]).all()
    assert layer.own_weight.tolist() == pytest.approx([0.8, 1 / 3, 0.2], abs=1e-6)
    assert layer.gradients is None is layer.cosines


def test_gates_are_averaged_over_all_batches():
    net, batch = toy(), rows(90)
    with torch.no_grad():
        net.mixture.weight.normal_()
    parts = [Rows(*(c[s] for c in batch[:4])) for s in (slice(0, 20), slice(20, 90))]
    expected = net.mixture.weights(batch.v).mean(0).detach().numpy()
    for batches in ([batch], parts):
        found = diagnose(net, batches)
        np.testing.assert_allclose(found.layers[0].weights, expected, atol=1e-6)
        assert found.rows == 90
        assert found.layers[0].row_entropy.max() < found.layers[0].entropy.max()


def test_self_gates_are_a_path_of_their_own():
    net = toy(self_gates=True)
    layer = diagnose(net, [rows()], gradients=False).layers[0]
    np.testing.assert_allclose(layer.weights.sum(1), 1, atol=1e-6)
    assert layer.residual[0, 0] == pytest.approx(0.5, abs=0.1)
    total = net.mixture.weights(rows().v).mean(0).detach()
    np.testing.assert_allclose(layer.weights + layer.residual, total, atol=1e-6)


def test_gradients_are_those_of_every_task_alone():
    net, batch = toy(), rows()
    layer = diagnose(net, [batch]).layers[0]
    net.eval()
    per_task = torch.nn.functional.binary_cross_entropy_with_logits
    for t in range(3):
        loss = per_task(net(batch.v)[:, t], batch.labels[:, t])
        found = torch.autograd.grad(loss, list(net.experts.parameters()))
        norms = torch.cat([g.reshape(5, -1) for g in found], 1).norm(dim=1)
        np.testing.assert_allclose(layer.gradients[t] / 64, norms.numpy(), rtol=1e-4, atol=1e-9)
        assert (layer.gradients[t, [e for e in range(3) if e != t]] == 0).all()
    np.testing.assert_allclose(layer.gradient_share[:, 3:].sum(0), 1, atol=1e-6)
    expected = layer.gradients[1, 1] / layer.gradients[1].sum()
    assert layer.own_gradient[1] == pytest.approx(expected)


def test_tasks_pull_together_or_apart():
    net, batch = toy(), rows()
    with torch.no_grad():
        net.mixture.weight.zero_()
        net.towers.copy_(torch.ones(3, 4))
        net.towers[2] = -1
    alike = batch.labels[:, :1].expand(-1, 3)

    def losses(logits, labels, mask, weight):
        return (logits * labels).mean(0)

    cosines = diagnose(net, [batch._replace(labels=alike)], losses).layers[0].cosines
    np.testing.assert_allclose(cosines, [[1, 1, -1], [1, 1, -1], [-1, -1, 1]], atol=1e-5)


def test_a_task_that_takes_a_shared_expert_degrades_it():
    net = toy()
    with torch.no_grad():
        net.mixture.weight.zero_()
        net.mixture.bias.copy_(torch.tensor([0.0, 6, 0, 6, -6, 0, 6, -6, 0]))
    layer = diagnose(net, [rows()], gradients=False).layers[0]
    assert layer.degraded.tolist() == [False, False, False, True, False]
    assert layer.occupancy[0, 3] > 0.95
    # by gradient alone: equal weights, one task with a far larger loss
    with torch.no_grad():
        net.mixture.bias.zero_()

    def losses(logits, labels, mask, weight):
        return logits.mean(0) * torch.tensor([100.0, 1, 1])

    layer = diagnose(net, [rows()], losses).layers[0]
    assert layer.occupancy[:, 3].max() < 0.5
    assert layer.degraded.tolist() == [False, False, False, True, True]


@pytest.mark.fault("video R5")
@pytest.mark.parametrize("bias", [50.0, 200.0])
def test_a_gate_that_is_saturated_degrades_its_expert(bias):
    """Weights of e^-200 are 0 in float32; the expert stays one that the gate may use."""
    net = MMoE(6, [Task("a"), Task("b")], num_experts=2, dim=4, hidden_dims=[4])
    with torch.no_grad():
        net.mixture.weight.zero_()
        net.mixture.bias.copy_(torch.tensor([bias, 0, 0, bias]))
    found = diagnose(net, [rows(tasks=2, dim=6)])
    layer = found.layers[0]
    np.testing.assert_allclose(layer.weights, np.eye(2), atol=1e-12)
    assert layer.visible.all()
    assert layer.shared.all()
    assert layer.degraded.all()
    np.testing.assert_allclose(layer.occupancy, np.eye(2), atol=1e-12)
    assert (found.summary()["degraded"], found.summary()["occupancy_max"]) == (2, pytest.approx(1))


def test_sparse_tasks_that_ignore_their_experts_are_underfitted():
    net, batch = toy(), rows(400)
    rates = torch.tensor([0.5, 0.2, 0.05])
    labels = (torch.rand(400, 3, generator=torch.Generator().manual_seed(1)) < rates).float()
    with torch.no_grad():
        net.mixture.weight.zero_()
        net.mixture.bias.copy_(torch.tensor([2.0, 0, 0, 1, 0, 0, -3, 0, 0]))
    found = diagnose(net, [batch._replace(labels=labels)])
    assert found.summary()["own_weight_correlation"] == pytest.approx(1)
    assert found.positives == tuple(labels.sum(0).int().tolist())
    other = ExpertReport(found.layers, found.tasks, found.positives[::-1], found.rows)
    assert other.summary()["own_weight_correlation"] == pytest.approx(-1)


def test_dead_experts():
    net = toy(mask=torch.ones(3, 5, dtype=torch.bool))
    with torch.no_grad():
        net.mixture.weight.zero_()
        net.mixture.bias.copy_(torch.tensor([0.0, 0, 0, -9, 0] * 3))
    layer = diagnose(net, [rows()], gradients=False).layers[0]
    assert layer.dead.tolist() == [False, False, False, True, False]


def test_the_model_stays_as_it_was():
    net, batch = toy(), rows()
    net.mixture.eval()  # one part in another mode
    state = {name: value.clone() for name, value in net.state_dict().items()}
    diagnose(net, [batch])
    assert net.training
    assert net.experts.training
    assert not net.mixture.training
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not any(module._forward_hooks for module in net.modules())


def test_hooks_are_removed_after_an_error():
    net = toy()
    with pytest.raises(ValueError, match="must be"):
        diagnose(net, [rows(dim=4)])
    assert not any(module._forward_hooks for module in net.modules())
    assert net.training


def test_a_model_without_experts_has_an_empty_report():
    found = diagnose(Plain(), [rows(tasks=1)])
    assert (found.notes, found.layers) == (("the model has no layer of experts",), ())
    assert found.summary() == {}
    assert found.table().height == found.gate_table().height == 0
    assert found.table().columns[:2] == ["layer", "expert"]


def test_a_task_without_positives_or_rows_is_measured_as_far_as_it_can_be():
    batch = rows()
    labels, mask = batch.labels.clone(), batch.mask.clone()
    labels[:, 0] = 0
    labels[:, 2], mask[:, 2] = torch.nan, False
    found = diagnose(toy(), [batch._replace(labels=labels, mask=mask)])
    assert found.notes == ("no positive row of t0, t2",)
    layer = found.layers[0]
    assert layer.gradients[0].sum() > 0
    assert (layer.gradients[2] == 0).all()
    assert np.isnan(layer.cosines[2]).all()
    assert np.isfinite(layer.cosines[:2, :2]).all()
    assert np.isnan(layer.own_gradient[2])


def test_frozen_experts_have_no_gradients():
    net = toy()
    net.experts.requires_grad_(False)
    assert diagnose(net, [rows()]).layers[0].gradients is None


def test_tables():
    found = diagnose(toy(), [rows()])
    table, layer = found.table(), found.layers[0]
    assert table["expert"].to_list() == ["t0 0", "t1 1", "t2 2", "shared 3", "shared 4"]
    assert table["std"].to_list() == pytest.approx(layer.std.tolist())
    assert table["occupancy_max"].null_count() == 3
    assert table["occupancy_max"][4] == pytest.approx(layer.occupancy[:, 4].max())
    gates = found.gate_table()
    assert gates["gate"].to_list() == ["t0", "t1", "t2"]
    assert gates["positives"].to_list() == list(found.positives)
    assert gates["own_weight"].to_list() == pytest.approx(layer.own_weight.tolist())
    summary = found.summary()
    assert summary["zero_rate_max"] == 0
    assert summary["scale_ratio"] == pytest.approx(layer.std.max() / layer.std.min())
    assert summary["task_gate_weight_max"] == pytest.approx(layer.weights.max())
    with pytest.raises(KeyError, match="no layer 'x'; there are layer 1"):
        found.layer("x")


def test_faults(refuses):
    refuses(
        GatesError,
        ("Linear holds no MultiTaskNet", lambda: diagnose(nn.Linear(2, 2), [rows()])),
        ("there is no row to diagnose a model on", lambda: diagnose(toy(), [])),
    )


def world(n=3000):
    rng = np.random.default_rng(0)
    table = pl.DataFrame(
        {
            "strong": rng.normal(size=n),
            "weak": rng.normal(size=n),
            "noise": rng.normal(size=n),
            "hidden": rng.normal(size=n),
        }
    )
    return table, rng.random((n, 2)) < score(table), rng.integers(0, 150, n)


def score(table):
    strong, weak = table["strong"].to_numpy(), table["weak"].to_numpy()
    return 1 / (1 + np.exp(-np.stack((2 * strong + 0.5 * weak, 0.5 * weak), 1)))


def test_fields_are_ordered_by_what_the_model_needs():
    table, labels, users = world()
    found = permutation_importance(
        score, table, ["noise", "weak", "strong"], ["a", "b"], labels, users,
        draws=user_resamples(users, resamples=200),
    )  # fmt: skip
    assert [one.field for one in found] == ["strong", "weak", "noise"]
    strong, weak, noise = found
    assert strong.total.low > weak.total.high > weak.total.low > 0
    assert (noise.total[:3], strong.tasks["b"].value) == ((0, 0, 0), 0)
    assert weak.tasks["b"].low > 0
    assert weak.total.value == pytest.approx(sum(gap.value for gap in weak.tasks.values()))
    assert strong.total.units == 150


def test_groups_are_permuted_together():
    table, labels, users = world(1000)
    same = table.with_columns(copy=pl.col("strong"))
    both = score(same)

    def of_either(t):
        return score(t.with_columns(strong=(pl.col("strong") + pl.col("copy")) / 2))

    options = {"draws": user_resamples(users, resamples=50), "repeats": 2}
    np.testing.assert_allclose(of_either(same), both)
    alone = permutation_importance(
        of_either, same, ["strong"], ["a", "b"], labels, users, **options
    )[0]
    grouped = permutation_importance(
        of_either, same, {"pair": ["strong", "copy"]}, ["a", "b"], labels, users, **options
    )[0]
    single = permutation_importance(score, table, ["strong"], ["a", "b"], labels, users, **options)[
        0
    ]
    assert (grouped.field, grouped.total) == ("pair", pytest.approx(single.total))
    assert alone.total.value < 0.7 * grouped.total.value


def test_masked_rows_do_not_count():
    table, labels, users = world(500)
    labels = labels.astype(float)
    mask = np.ones(labels.shape, dtype=bool)
    mask[:, 1] = False
    labels[:, 1] = np.nan
    found = permutation_importance(
        score, table, ["weak"], ["a", "b"], labels, users, mask=mask, repeats=1,
        draws=user_resamples(users, resamples=20),
    )  # fmt: skip
    assert list(found[0].tasks) == ["a"]


def test_faults_of_importance():
    table, labels, users = world(50)
    with pytest.raises(GatesError, match="the table lacks x; its columns are strong, weak"):
        permutation_importance(score, table, ["x"], ["a", "b"], labels, users)
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        permutation_importance(score, table, ["weak"], ["a", "b"], labels, users, repeats=0)


TASKS = [Task("view", category="watch"), Task("end", category="watch"), Task("like"), Task("buy")]
SMALL = {"dim": 5, "hidden_dims": [6], "tower_dims": [4]}
HOME = {"rank": 2}
FORMS = [
    *((name, {}) for name in sorted(set(MODELS) - {"HoME", "Linear", "WideAndDeep"})),
    ("HoME", HOME),
    ("HoME", {**HOME, "layer2_shared_input": "shared_only"}),
    ("HoME", {**HOME, "task_experts": 2, "self_gate": False}),
    ("HoME", {**HOME, "mask": False, "norm": None, "activation": "relu"}),
]


@pytest.mark.parametrize(("name", "options"), FORMS)
def test_gates_share_one_among_experts_and_paths_add_up(name, options):
    torch.manual_seed(0)
    net = build(name, {**SMALL, **options}, 8, TASKS)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    v = torch.randn(50, net.copies, 8) if net.copies > 1 else torch.randn(50, 8)
    labels = (torch.rand(50, 4) < 0.4).float()
    rows = Rows(v, labels, torch.ones(50, 4, dtype=torch.bool), torch.ones(50))
    seen = {}
    layers = net.expert_layers()
    for layer in layers:

        def look(module, given, _, name=layer.name):
            both = {"residual": True} if isinstance(module, MaskedMixture) else {}
            seen[name] = module.weights(given[0], **both).detach()

        layer.mixture.register_forward_hook(look)
    report = diagnose(net, [rows])
    assert [one.name for one in report.layers] == [layer.name for layer in layers]
    for layer, found in zip(layers, report.layers, strict=True):
        assert found.weights.shape == (len(layer.gate_names), len(layer.expert_names))
        np.testing.assert_array_equal(found.visible, found.weights > 0)
        total = found.weights + (0 if found.residual is None else found.residual)
        np.testing.assert_allclose(total, seen[layer.name].mean(0), atol=1e-5)
        np.testing.assert_allclose(found.weights.sum(1), 1, atol=1e-5)
        assert (found.gradients is None) == (layer.name in " ".join(report.notes))
