"""Weights of other libraries, stacked as ours are.

Every parameter and buffer of ours is made of several of theirs: stacked, or one after the other.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from core_gates.moe.normed_experts import NormedExperts
from recsys.models import build
from recsys.models.adatt import AdaTTLayer
from recsys.models.net import mixture
from recsys.models.ple import ExtractionLayer
from recsys.schema import Task

NORM = ("weight", "bias", "running_mean", "running_var")


class Map:
    """Fills a module of ours from theirs, and compares gradients and statistics with theirs."""

    def __init__(self):
        self.parts = {}

    def experts(self, ours, theirs, layers):
        """Experts; ``layers`` holds the names of linear map and normalization of each layer."""
        for j, (linear, norm) in enumerate(layers):
            for kind, name in (("weights", "weight"), ("biases", "bias")):
                self.parts[f"{ours}.{kind}.{j}"] = [f"{e}.{linear}.{name}" for e in theirs]
            if norm is not None:
                self.joined(f"{ours}.norms.{j}", [f"{e}.{norm}" for e in theirs], NORM)
        return self

    def joined(self, ours, theirs, names=("weight", "bias")):
        """A module whose rows are those of several of theirs."""
        for name in names:
            self.parts[f"{ours}.{name}"] = [f"{t}.{name}" for t in theirs]
        return self

    def wanted(self, arrays, ours, like, prefix):
        """What theirs make of a tensor of ours; None if they have none."""
        found = [arrays.get(prefix + name) for name in self.parts[ours]]
        return None if found[0] is None else torch.cat([f.flatten() for f in found]).view_as(like)

    def fill(self, net, arrays):
        state = net.state_dict()
        counted = {name for name in state if name.endswith("num_batches_tracked")}
        assert self.parts.keys() == state.keys() - counted
        for name in self.parts:
            value = self.wanted(arrays, name, state[name], "param/")
            if value is None:
                assert "bias" in name, f"theirs have no {name}"
                value = torch.zeros_like(state[name])
            state[name] = value
        net.load_state_dict(state)
        return net

    def check(self, net, arrays, mode):
        """Compare all gradients and, in training mode, running statistics."""
        gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
        compared = self._compare(gradients, arrays, f"{mode}/grad/", 1e-8)
        assert {name for name in compared if "weight" in name} == {
            name for name, _ in net.named_parameters() if "weight" in name
        }
        if mode == "train":
            buffers = {n: b for n, b in net.named_buffers() if n in self.parts}
            assert len(self._compare(buffers, arrays, "after_train/", 1e-10)) == len(buffers)

    def _compare(self, found, arrays, prefix, tolerance):
        compared = []
        for name, tensor in found.items():
            wanted = self.wanted(arrays, name, tensor, prefix)
            if wanted is not None:
                assert_close(tensor, wanted, rtol=0, atol=tolerance, msg=lambda m, n=name: n + m)
                compared.append(name)
        return compared


GOLDEN = Path(__file__).parents[2] / "golden" / "recsys"


@pytest.fixture
def vectors():
    """``vectors(name)``: the arrays of a file as tensors, and its ``config`` as a dictionary."""

    def load(name):
        with np.load(GOLDEN / f"{name}.npz") as arrays:
            config = json.loads(str(arrays["config"]))
            kept = {key: torch.from_numpy(arrays[key]) for key in arrays if key != "config"}
        return config, kept

    return load


MODES = ("eval", "train")
TWO = [("mlp.0", "mlp.1"), ("mlp.4", "mlp.5")]  # layers of an MLP of torch-rechub
ONE = TWO[:1]


def rechub_options(config):
    """Batch normalization before every activation, ReLU everywhere."""
    *hidden, dim = config["expert_dims"]
    towers = {"tower_dims": config["tower_dims"], "tower_norm": "batch", "tower_activation": "relu"}
    return {"dim": dim, "hidden_dims": hidden, "norm": "batch", "activation": "relu", **towers}


def named(pattern, number):
    return [pattern.format(i) for i in range(number)]


def towers(m, theirs):
    m.experts("towers.hidden", theirs, ONE)
    return m.joined("towers", [f"{t}.mlp.4" for t in theirs])


def mmoe(config):
    m = Map().experts("experts", named("experts.{}", config["n_expert"]), TWO)
    gates = named("gates.{}", config["n_task"])
    m.joined("mixture", [f"{g}.mlp.0" for g in gates])
    m.joined("mixture.norm", [f"{g}.mlp.1" for g in gates], NORM)
    options = {"num_experts": config["n_expert"], "gate_norm": "batch"}
    return "MMoE", options, towers(m, named("towers.{}", config["n_task"]))


def ple(config):
    levels, own, shared = (config[key] for key in ("levels", "specific", "shared"))
    m, tasks = Map(), config["n_task"]
    for level in range(levels):
        theirs, ours = f"cgc_layers.{level}", f"layers.{level}"
        names = named(theirs + ".experts_specific.{}", own * tasks)
        m.experts(f"{ours}.experts", names + named(theirs + ".experts_shared.{}", shared), TWO)
        gates = named(theirs + ".gates_specific.{}", tasks)
        gates += [f"{theirs}.gate_shared"] if level < levels - 1 else []
        m.joined(f"{ours}.mixture", [f"{g}.mlp.0" for g in gates])
        m.joined(f"{ours}.mixture.norm", [f"{g}.mlp.1" for g in gates], NORM)
    options = {"levels": levels, "num_task_experts": own, "num_shared_experts": shared}
    return "PLE", {**options, "gate_norm": "batch"}, towers(m, named("towers.{}", tasks))


def sharedbottom(config):
    m = Map().experts("bottom", ["bottom_mlp"], TWO)
    return "SharedBottom", {}, towers(m, named("towers.{}", config["n_task"]))


NETWORKS = {"mmoe": mmoe, "ple1": ple, "ple2": ple, "sharedbottom": sharedbottom}


def inputs(arrays):
    """The embeddings of torch-rechub, as leaves, and the inputs (B, D) they give."""
    tables = {
        f: arrays[f"param/embedding.embed_dict.{f}.weight"].clone().requires_grad_()
        for f in ("f0", "f1", "f2")
    }
    return tables, torch.cat([tables[f][arrays[f"in/{f}"]] for f in tables], 1)


def check_tables(tables, arrays, mode):
    for f, table in tables.items():
        wanted = arrays[f"{mode}/grad/embedding.embed_dict.{f}.weight"]
        assert_close(table.grad, wanted, rtol=0, atol=1e-8)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NETWORKS)
def test_rechub(name, mode, vectors):
    config, arrays = vectors(f"rechub_{name}_a")
    kind, options, m = NETWORKS[name](config)
    tables, v = inputs(arrays)
    tasks = [Task(f"t{t}") for t in range(config["n_task"])]
    net = build(kind, {**rechub_options(config), **options}, v.shape[1], tasks).double()
    m.fill(net, arrays).train(mode == "train")
    probabilities = net(v).sigmoid()
    assert_close(probabilities, arrays[f"{mode}/out"], rtol=0, atol=1e-10)
    (arrays["loss_weight"] * probabilities).sum().backward()
    m.check(net, arrays, mode)
    check_tables(tables, arrays, mode)


@pytest.mark.parametrize("name", ["adatt_sp_a", "adatt_shared_a"])
def test_adatt(name, vectors):
    config, arrays = vectors(name)
    tasks, own = config["num_tasks"], config["num_task_experts"]
    shared = config.get("num_shared_experts", 0)
    counts = [own] * tasks + [shared] * bool(shared)
    dims, x = config["expert_out_dims"], arrays["in/x"].clone().requires_grad_()
    layers, m = nn.Sequential(), Map()
    for level, expert_dims in enumerate(dims):
        last = level == len(dims) - 1
        gates = tasks if last else len(counts)
        inner = dims[level - 1][-1] if level else config["input_dim"]
        options = {"num_gates": gates, "shared": bool(shared), "first": False}
        layers.append(AdaTTLayer(counts, inner, expert_dims, **options))
        names = named(f"experts.{level}.{{}}", sum(counts))
        mlp = [(f"mlp_net.{2 * j}", None) for j in range(len(expert_dims))]
        m.experts(f"{level}.experts", names, mlp)
        m.joined(f"{level}.mixture", named(f"gate_weights.{level}.{{}}.0", gates))
        own_weights = arrays_of_level(arrays, level, gates, bool(shared))
        m.parts[f"{level}.mixture.self_weight"] = own_weights
    net = m.fill(layers.double(), arrays)
    out = net(x)
    assert_close(out, arrays["eval/out"], rtol=0, atol=1e-10)
    (arrays["loss_weight"] * out).sum().backward()
    m.check(net, arrays, "eval")
    assert_close(x.grad, arrays["eval/grad_in/x"], rtol=0, atol=1e-8)
    assert any("self_weight" in n and p.grad.abs().min() > 0 for n, p in net.named_parameters())


def arrays_of_level(arrays, level, gates, shared):
    """Names of the free weights of a level: a table per level, or one per unit with a row each."""
    if not shared:
        return [f"self_exp_weights.{level}"]
    names = []
    for unit in range(gates):
        for prefix in ("param/", "eval/grad/"):
            key = f"self_exp_weights.{unit}"
            arrays[f"{prefix}{key}[{level}]"] = arrays[f"{prefix}{key}"][level]
        names.append(f"self_exp_weights.{unit}[{level}]")
    return names


TZREC = [(f"mlp.{j}.perceptron.0", f"mlp.{j}.perceptron.1") for j in range(2)]


@pytest.mark.parametrize("mode", MODES)
def test_tzrec_mmoe(mode, vectors):
    """Gates with a hidden layer."""
    config, arrays = vectors("tzrec_mmoe_a")
    experts, tasks, dim = config["num_expert"], config["num_task"], config["in_features"]
    m = Map().experts("experts", named("expert_mlps.{}", experts), TZREC)
    m.experts("mixture.hidden", named("gate_mlps.{}", tasks), [("mlp.0.perceptron.0", None)])
    m.joined("mixture", named("gate_finals.{}", tasks))
    mask = torch.ones(tasks, experts, dtype=torch.bool)
    parts = {
        "experts": NormedExperts(experts, dim, config["expert_hidden"], activation="relu"),
        "mixture": mixture(dim, mask, hidden_dims=config["gate_hidden"]),
    }
    net = m.fill(nn.ModuleDict(parts).double(), arrays).train(mode == "train")
    x = arrays["in/x"].clone().requires_grad_()
    check_layer(net, m, x, net["mixture"](x, net["experts"](x)), arrays, mode)


@pytest.mark.parametrize("mode", MODES)
def test_tzrec_cgc(mode, vectors):
    config, arrays = vectors("tzrec_cgc_a")
    tasks, own, shared = (config[k] for k in ("num_task", "expert_num_per_task", "share_num"))
    names = [f"_task_layers.{t}.{i}" for t in range(tasks) for i in range(own)]
    m = Map().experts("experts", names + named("_shared_layers.{}", shared), TZREC)
    m.joined("mixture", [*named("_task_gates.{}", tasks), "_shared_gate"])
    layer = ExtractionLayer(
        tasks,
        config["in_features"],
        config["expert_hidden"],
        num_task_experts=own,
        num_shared_experts=shared,
        last=False,
        norm="batch",
    )
    net = m.fill(layer.double(), arrays).train(mode == "train")
    x = arrays["in/x"].clone().requires_grad_()
    check_layer(net, m, x, net(x), arrays, mode)


def check_layer(net, m, x, out, arrays, mode):
    assert_close(out, arrays[f"{mode}/out"], rtol=0, atol=1e-10)
    (arrays["loss_weight"] * out).sum().backward()
    m.check(net, arrays, mode)
    assert_close(x.grad, arrays[f"{mode}/grad_in/x"], rtol=0, atol=1e-8)
