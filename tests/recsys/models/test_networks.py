"""What every network keeps to: shapes, options, and where gradients may go."""

import json
from copy import deepcopy

import polars as pl
import pytest
import torch
from torch.testing import assert_close

from core_gates.errors import GatesError
from recsys import models
from recsys.model_folder import load_model, save_model
from recsys.models import MODELS, build, num_weights, options_of, sized
from recsys.ranker import Ranker
from recsys.schema import FeatureSchema, Sparse, Task
from recsys.transform import FeatureTransform

TASKS = [Task("click"), Task("like"), Task("buy")]
SMALL = {"dim": 5, "hidden_dims": [6], "tower_dims": [4]}
OTHERS = sorted(set(MODELS) - {"HoME", "Linear", "WideAndDeep"})
WITH_EXPERTS = ["OMoE", "MMoE", "CGC", "PLE", "AdaTT"]


def made(name, seed=0, **options):
    torch.manual_seed(seed)
    net = build(name, {**SMALL, **options}, 8, TASKS).double()
    for parameter in net.parameters():  # gates near uniform and zero biases hide mistakes
        torch.nn.init.normal_(parameter, std=0.7)
    return net


def inputs(net, rows=6, seed=1):
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(rows, *shape, generator=generator, dtype=torch.float64)

    v = drawn(net.copies, 8) if net.copies > 1 else drawn(8)
    return v.requires_grad_(), drawn(net.prior_dim) if net.prior_dim else None


@pytest.mark.parametrize("name", OTHERS)
def test_every_parameter_moves_the_logits(name):
    """In evaluation rows do not depend on each other, and no weight is without use."""
    net = made(name).eval()
    v, prior = inputs(net)
    logits = net(v, prior)
    assert logits.shape == (6, 3)
    assert torch.isfinite(logits).all()
    alone = net(v[2:3], None if prior is None else prior[2:3])
    assert_close(alone[0], logits[2], rtol=0, atol=1e-12)
    logits.square().sum().backward()
    unmoved = {n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()}
    fixed = {n for n in unmoved if n.endswith("self_weight")}  # one native expert: s = 1
    assert (unmoved, len(fixed)) == (fixed, (2 if name == "AdaTT" else 0))


@pytest.mark.fault("video V24")
@pytest.mark.parametrize("name", [*OTHERS, "HoME"])
def test_half_precision_gives_nearly_the_same(name):
    exact = made(name).eval()
    for parameter in exact.parameters():
        parameter.data.mul_(0.5)
    v, prior = inputs(exact)
    logits = deepcopy(exact).bfloat16()(v.bfloat16(), None if prior is None else prior.bfloat16())
    assert logits.dtype == torch.bfloat16
    logits.float().sum().backward()
    assert_close(logits.double(), exact(v, prior), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", OTHERS)
def test_options_survive_json_and_the_meta_device(name):
    options = json.loads(json.dumps(SMALL))
    assert options.keys() <= set(options_of(name))
    net, here = build(name, options, 8, TASKS, device="meta"), build(name, options, 8, TASKS)
    assert all(p.is_meta for p in net.parameters())
    assert {n: p.shape for n, p in net.named_parameters()} == {
        n: p.shape for n, p in here.named_parameters()
    }


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mmoe", {}, "no network 'mmoe' .did you mean 'MMoE'..; choose from SingleTask, "),
        ("MMoE", {"num_expert": 3}, "MMoE has no option 'num_expert' .did you mean 'num_experts'"),
        ("CGC", {"levels": 2}, "CGC has no option 'levels'"),
        ("Linear", {"dim": 2}, r"Linear has no option 'dim'; choose from none: options \{\}"),
        ("MMoE", {"device": "cpu"}, "no option 'device'"),
        ("PLE", {"dim": 0}, "PLE: .*at least 1"),
        ("PLE", {"norm": "layer"}, "PLE: norm is 'layer'; choose one of batch, none"),
        ("PLE", {"num_shared_experts": 0}, "num_shared_experts must be at least 1"),
        ("MMoE", {"activation": "swish"}, "activation is 'swish'"),
        ("MMoE", {"gate": "Softmax"}, "gate is 'Softmax'; choose one of softmax, "),
        ("MMoE", {"gate_options": {"k": 2}}, "gate is softmax; give its gate_dims"),
        ("MMoE", {"gate": "TopKGate", "gate_options": {"kk": 2}}, "gate_options of TopKGate"),
        ("MMoE", {"gate": "HashGate", "gate_options": {"num_ids": 5}}, "gate_feature"),
        ("MMoE", {"gate": "SinkhornGate"}, "must not depend on them"),
    ],
)
def test_mistakes_are_one_line(name, options, message):
    with pytest.raises(GatesError, match=message) as caught:
        build(name, options, 8, TASKS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_described_layers_mix_as_the_network_does(name):
    net = made(name).eval()
    v, prior = inputs(net)
    seen = {}
    for layer in net.expert_layers():
        layer.mixture.register_forward_hook(
            lambda m, args, out, layer=layer: seen.__setitem__(layer.name, (args, out))
        )
    net(v, prior)
    for layer in net.expert_layers():
        (x, experts), out = seen[layer.name]
        weights = layer.mixture.weights(x)
        number = len(layer.expert_names)
        assert weights.shape == (6, len(layer.gate_names), number)
        assert len(set(layer.expert_names)) == number == len(layer.expert_groups)
        assert_close(weights @ experts, out, rtol=0, atol=1e-12)
        assert all(len(p) % number == 0 for p in layer.experts.parameters())


@pytest.mark.parametrize("name", OTHERS)
def test_folded_networks_have_no_normalization_and_the_same_logits(name):
    norms = {"norm": "batch", "tower_norm": "batch", "gate_norm": "batch", "gate_dims": [3]}
    net = made(name, **{o: v for o, v in norms.items() if o in options_of(name)})
    v, prior = inputs(net)
    for seed in range(3):  # statistics that are not 0 and 1
        net(*inputs(net, seed=seed))
    folded = net.eval().folded()
    assert_close(folded(v, prior), net(v, prior), rtol=0, atol=1e-12)
    assert any("running_mean" in n for n, _ in net.named_buffers())
    assert not any("running_mean" in n for n, _ in folded.named_buffers())


def test_a_network_per_task_with_its_own_embeddings():
    net = made("SingleTask", own_embeddings=True)
    assert net.copies == 3
    v, _ = inputs(net)
    grads = [torch.autograd.grad(net(v)[:, t].sum(), v)[0] for t in range(3)]
    moved = [[bool(g[:, c].abs().sum()) for c in range(3)] for g in grads]
    assert moved == torch.eye(3, dtype=torch.bool).tolist()


ROUTING = {
    "DSelectKGate": {"k": 2},
    "CometGate": {"k": 2},
    "NoisyTopKGate": {"k": 2},
    "TopKGate": {"k": 2},
    "SoftmaxGate": {},
}


@pytest.mark.parametrize("gate", ROUTING)
@pytest.mark.parametrize("name", ["MMoE", "OMoE"])
def test_any_routing_gate(gate, name):
    """A mixture of the same weights; what the gates lose is handed over once."""
    net = made(name, gate=gate, gate_options=ROUTING[gate], num_experts=4, gate_loss=0.5)
    v, _ = inputs(net)
    logits = net(v)
    losses = net.losses(logits)
    expected = {"DSelectKGate": {"gate_entropy", "gate_lost_mass"}, "CometGate": {"gate_entropy"}}
    expected["NoisyTopKGate"] = {"gate_importance", "gate_load"}
    assert (set(losses), net.losses(logits)) == (expected.get(gate, set()), {})
    net.eval()
    weights = net.mixture.weights(v)
    mixed = weights @ net.experts(v)
    assert_close(net(v), net.towers(mixed[:, 0] if name == "OMoE" else mixed))
    assert weights.shape == (6, 1 if name == "OMoE" else 3, 4)
    if "k" in ROUTING[gate]:
        assert (weights == 0).any()


def test_a_hash_gate_routes_by_the_rows_of_a_feature():
    options = {"gate": "HashGate", "gate_options": {"num_ids": 6}, "gate_feature": "user"}
    net = made("MMoE", num_experts=3, **options).eval()
    assert net.id_feature == "user"
    v, _ = inputs(net)
    ids = torch.arange(6)
    logits = net(v, None, ids)
    alone = net.experts(v)[ids, net.mixture.gates[0](v, ids=ids).indices[:, 0]]
    assert_close(logits, net.towers(alone.unsqueeze(1).expand(-1, 3, -1)))


def test_a_network_of_ones_own_is_found_by_its_place(tmp_path, monkeypatch):
    (tmp_path / "own_nets.py").write_text(
        "from torch import nn\n"
        "from recsys.models import MultiTaskNet\n"
        "class Linear(MultiTaskNet):\n"
        "    def __init__(self, input_dim, tasks, *, bias=True, device=None):\n"
        "        super().__init__(input_dim, tasks)\n"
        "        self.linear = nn.Linear(input_dim, len(tasks), bias=bias, device=device)\n"
        "    def forward(self, v, prior=None, ids=None):\n"
        "        return self.linear(v)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    schema = FeatureSchema(tasks=tuple(TASKS), sparse=(Sparse("user"),))
    rows = {t.name: [0, 1, 0, 1] for t in TASKS} | {"user": [1, 2, 1, 2]}
    transform = FeatureTransform(schema).fit(pl.DataFrame(rows))
    ranker = Ranker.build(schema, transform.sizes, 0, "own_nets.Linear", {"bias": False}).eval()
    folder = save_model(tmp_path / "model", ranker, transform)
    batch = transform.batch(pl.DataFrame(rows))
    again = load_model(folder).ranker
    assert_close(again(batch.sparse, batch.dense), ranker(batch.sparse, batch.dense))
    assert again.net.linear.bias is None
    with pytest.raises(GatesError, match="Linear has no option 'bais'"):
        build("own_nets.Linear", {"bais": False}, 8, TASKS)
    for name, words in {
        "own_nets.Missing": "cannot be imported",
        "no_such_module.Net": "cannot be imported",
        "collections.OrderedDict": "derive it from recsys.models.MultiTaskNet",
    }.items():
        with pytest.raises(GatesError, match=words):
            options_of(name)


@pytest.mark.parametrize("name", OTHERS)
def test_a_network_of_a_size(name):
    options = {"dim": 12, "hidden_dims": [36], "tower_dims": [7]}
    found = sized(name, options, 20, TASKS, 60_000)
    weights = sum(p.numel() for p in build(name, found, 20, TASKS).parameters())
    assert num_weights(name, found, 20, TASKS) == weights
    assert abs(weights / 60_000 - 1) < 0.05
    assert found["hidden_dims"] == [3 * found["dim"]]
    assert {k: v for k, v in found.items() if k not in ("dim", "hidden_dims")} == {
        k: v for k, v in options.items() if k not in ("dim", "hidden_dims")
    }
    assert sized(name, found, 20, TASKS, 60_000) == found


def test_the_nearest_width_is_taken():
    found = sized("MMoE", {}, 20, TASKS, 60_000)
    gaps = {}
    for step in (-1, 0, 1):
        dim = found["dim"] + step
        options = {"dim": dim, "hidden_dims": [2 * dim]}
        gaps[step] = abs(num_weights("MMoE", options, 20, TASKS) - 60_000)
    assert min(gaps, key=gaps.get) == 0


def test_a_size_that_no_width_has(refuses):
    refuses(
        GatesError,
        (
            r"cannot have 500 weights: at dim=1 it has .*tower_dims",
            lambda: sized("PLE", {}, 20, TASKS, 500),
        ),
        ("no network", lambda: sized("Ple2", {}, 20, TASKS, 500)),
    )


@pytest.mark.fault("video R9")
@pytest.mark.parametrize(("target", "words"), [(1, "at dim="), (100_000, "whatever its dim")])
def test_a_width_without_effect(monkeypatch, target, words):
    options, tried = {"dim": 4, "hidden_dims": []}, []

    def counted(*given):
        tried.append(given)
        assert len(tried) < 100, "the search has no end"
        return num_weights(*given)

    monkeypatch.setattr(models, "num_weights", counted)
    with pytest.raises(GatesError, match=f"Widthless cannot have .* weights: .*{words}"):
        sized(f"{__name__}.Widthless", options, 32, TASKS, target)


@pytest.mark.parametrize("shared", [0, 2])
def test_a_single_native_expert_of_adatt_by_its_formula(shared):
    """Its weight is trained where there are shared experts (AdaTT), and 1 where not (AdaTT-sp)."""
    net = made("AdaTT", levels=1, num_shared_experts=shared, hidden_dims=()).eval()
    v, _ = inputs(net)
    (layer,), mixture = net.layers, net.layers[0].mixture
    experts = layer.experts
    count = 3 + shared
    assert mixture.self_weight.shape == (3 if shared else 0,)
    weights = experts.weights[0].detach().reshape(count, *experts.weights[0].shape[-2:])
    biases = experts.biases[0].detach().reshape(count, 1, -1)
    outputs = torch.relu(v.detach() @ weights.mT + biases if weights.shape[-1] == 8
                         else v.detach() @ weights + biases)  # fmt: skip
    for task in range(3):
        rows = slice(task * count, (task + 1) * count)
        gates = (v.detach() @ mixture.weight[rows].T + mixture.bias[rows]).softmax(-1)
        own = mixture.self_weight[task] if shared else 1.0
        expected = torch.einsum("be,ebf->bf", gates, outputs) + own * outputs[task]
        assert_close(layer(v)[:, task], expected, rtol=0, atol=1e-12)
    if shared:
        net(v)[:, 1].sum().backward()
        assert (mixture.self_weight.grad != 0).tolist() == [False, True, False]


def test_tasks_by_name_and_options_that_are_passed_on():
    from recsys import HoME, MMoE, Task

    net = HoME(8, {"click": "look", "buy": "act"}, dim=4, hidden_dims=(), rank=1)
    assert net.tasks == (Task("click", category="look"), Task("buy", category="act"))
    assert MMoE(8, ["click", "buy"], dim=2).tasks == (Task("click"), Task("buy"))
    name = f"{__name__}.Scaled"
    assert options_of(name) == ["scale", *options_of("MMoE")]
    built = build(name, {"scale": 2.0, "dim": 3, "num_experts": 2}, 8, TASKS)
    v = torch.ones(2, 8)
    assert_close(built(v), 2 * super(Scaled, built).forward(v))
    assert sized(name, {"num_experts": 2}, 8, TASKS, 3000)["dim"] > 3
    with pytest.raises(GatesError, match="has no option 'dimm'"):
        build(name, {"dimm": 3}, 8, TASKS)


class Widthless(models.MODELS["Linear"]):
    def __init__(self, input_dim, tasks, *, dim=4, hidden_dims=(), device=None):
        super().__init__(input_dim, tasks, device=device)


class Scaled(models.MODELS["MMoE"]):
    def __init__(self, input_dim, tasks, *, scale=1.0, **options):
        super().__init__(input_dim, tasks, **options)
        self.scale = scale

    def forward(self, v, prior=None, ids=None):
        return self.scale * super().forward(v, prior, ids)
