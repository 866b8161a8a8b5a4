"""Both layers of HoME, built from feature gates and masked mixtures, against golden vectors."""

import json

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from core_gates import LowRankFeatureGate, MaskedMixture, NormedExperts, SelfGate


class Home:
    """The model of the vectors; towers are written out, gates and experts are the modules."""

    def __init__(self, arrays, training):
        self.config = json.loads(arrays["config"])
        self.p = {k.removeprefix("param/"): v for k, v in arrays.items() if k.startswith("param/")}
        self.training = training
        self.z, self.h = {}, {}

    def normed(self, group):
        """The experts of a group, with the parameters and statistics of the vectors."""
        shapes = []
        while f"{group}.0.{len(shapes)}.W" in self.p:
            shapes.append(self.p[f"{group}.0.{len(shapes)}.W"].shape)
        number = sum(f"{group}.{i}.0.W" in self.p for i in range(len(self.p)))
        dims = [outputs for outputs, _ in shapes]
        experts = NormedExperts(number, shapes[0][1], dims, dtype=torch.float64)
        names = {"weight": "gamma", "bias": "beta", "running_mean": "mean", "running_var": "var"}
        state = experts.state_dict()
        for j in range(len(shapes)):
            for key, name in {"weights": "W", "biases": "b"}.items():
                parts = [self.p[f"{group}.{i}.{j}.{name}"] for i in range(number)]
                state[f"{key}.{j}"] = torch.stack(parts)
            for key, name in names.items():
                parts = [self.p[f"{group}.{i}.{j}.bn.{name}"] for i in range(number)]
                state[f"norms.{j}.{key}"] = torch.stack(parts)
        experts.load_state_dict(state)
        return experts.train(self.training)

    def experts(self, layer, group, x):
        """Outputs (B, N, D) of the experts of a group, after its feature gate."""
        fea = f"{layer}.fea.{group}"
        num_maps, dim, rank = self.p[f"{fea}.B"].shape
        gate = LowRankFeatureGate(dim, rank, num_maps=num_maps, dtype=torch.float64)
        names = {"mixer_weight": "Wg", "mixer_bias": "bg", "down": "B", "up": "A"}
        gate.load_state_dict({key: self.p[f"{fea}.{name}"] for key, name in names.items()})
        x = gate(x)
        return self.normed(f"{layer}.exp.{group}")(x)

    def mixture(self, layer, groups, mask, self_mask):
        mixture = MaskedMixture(
            self.p[f"{layer}.gate.{groups[0]}.W"].shape[1],
            torch.tensor(mask),
            self_mask=torch.tensor(self_mask),
            dtype=torch.float64,
        )
        names = [f"{layer}.{kind}.{g}" for kind in ("gate", "self") for g in groups]
        state = {"weight": torch.cat([self.p[f"{n}.W"] for n in names])}
        state["bias"] = torch.cat([self.p[f"{n}.b"] for n in names])
        mixture.load_state_dict(state)
        return mixture

    def __call__(self, v):
        cats = self.config["cats"]
        groups = [*cats, "shared"]
        outputs = {g: self.experts("l1", g, v) for g in groups}
        owner = [g for g in groups for _ in range(outputs[g].shape[1])]
        mask = [[o in (g, "shared") or g == "shared" for o in owner] for g in groups]
        mixture = self.mixture("l1", groups, mask, [[o == g for o in owner] for g in groups])
        z = mixture(v, torch.cat([outputs[g] for g in groups], 1))
        self.z = dict(zip(groups, z.unbind(1), strict=True))
        u = {c: torch.cat([self.z[c], self.z["shared"]], -1) for c in cats}
        shared = self.experts("l2", "shared", torch.cat([u[c] for c in cats]))
        shared = dict(zip(cats, shared.chunk(len(cats)), strict=True))
        for c in cats:
            self.tasks_of_category(c, u[c], shared[c])
        logits = []
        for t in range(len(self.config["task_cat"])):
            x, i = self.h[f"t{t}"], 0
            while f"tower.t{t}.{i}.W" in self.p:
                x = F.silu(x) if i else x
                x = F.linear(x, self.p[f"tower.t{t}.{i}.W"], self.p[f"tower.t{t}.{i}.b"])
                i += 1
            logits.append(x)
        return torch.cat(logits, 1)

    def tasks_of_category(self, c, u, shared):
        tasks = [f"t{t}" for t, cat in enumerate(self.config["task_cat"]) if cat == c]
        outputs = {g: self.experts("l2", g, u) for g in (*tasks, c)} | {"shared": shared}
        owner = [g for g, o in outputs.items() for _ in range(o.shape[1])]
        mask = [[o in (t, c, "shared") for o in owner] for t in tasks]
        mixture = self.mixture("l2", tasks, mask, [[o == t for o in owner] for t in tasks])
        h = mixture(u, torch.cat(list(outputs.values()), 1))
        self.h |= dict(zip(tasks, h.unbind(1), strict=True))


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", ["home_a", "home_b"])
def test_golden(name, mode, vectors):
    arrays = vectors(f"recsys/{name}")
    home = Home(arrays, mode == "train")
    v = arrays["v"].requires_grad_()
    logits = home(v)
    for group, z in home.z.items():
        assert_close(z, arrays[f"{mode}/z1.{group}"], rtol=0, atol=1e-10)
    for task, h in home.h.items():
        assert_close(h, arrays[f"{mode}/h2.{task}"], rtol=0, atol=1e-10)
    assert_close(logits, arrays[f"logits_{mode}"], rtol=0, atol=1e-10)
    (grad,) = torch.autograd.grad((arrays["loss_weight"] * logits).sum(), v)
    assert_close(grad, arrays[f"grad_v_{mode}"], rtol=0, atol=1e-8)  # central differences


@pytest.mark.parametrize("name", ["home_a", "home_b"])
def test_a_self_gate_is_the_difference_of_mixtures_with_and_without_it(name, vectors):
    """The self gate module computes the same as the row folded into the mixture."""
    arrays = vectors(f"recsys/{name}")
    home = Home(arrays, training=False)
    v, outputs = arrays["v"], home.experts("l1", "watch", arrays["v"])
    gate = SelfGate(v.shape[1], outputs.shape[1], dtype=torch.float64)
    weight, bias = (arrays[f"param/l1.self.watch.{part}"] for part in "Wb")
    gate.load_state_dict({"weight": weight, "bias": bias})
    everything = torch.ones(1, outputs.shape[1], dtype=torch.bool)
    kwargs = {"dtype": torch.float64}
    with_it = MaskedMixture(v.shape[1], everything, self_mask=everything, **kwargs)
    without = MaskedMixture(v.shape[1], everything, **kwargs)
    n = outputs.shape[1]
    with_it.load_state_dict(
        {"weight": torch.cat([without.weight, weight]), "bias": torch.cat([without.bias, bias])}
    )
    residual = with_it(v, outputs)[:, 0] - without(v, outputs)[:, 0]
    assert without.weight.shape == (n, v.shape[1])
    assert_close(gate(v, outputs), residual, rtol=0, atol=1e-12)
