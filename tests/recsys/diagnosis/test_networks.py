"""Every network of the library can be diagnosed, HoME in all its forms."""

import numpy as np
import pytest
import torch

from core_gates.gates.mixture import MaskedMixture
from recsys.diagnosis import Rows, diagnose
from recsys.models import MODELS, build
from recsys.schema import Task

TASKS = [Task("view", category="watch"), Task("end", category="watch"), Task("like"), Task("buy")]
SMALL = {"dim": 5, "hidden_dims": [6], "tower_dims": [4]}
NEEDED = {"ESMM": {"conditions": {"buy": "view"}}, "PEPNet": {"prior_dim": 3, "gate_dim": 4}}
HOME = {"rank": 2}
FORMS = [
    *((name, NEEDED.get(name, {})) for name in sorted(set(MODELS) - {"HoME"})),
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
    prior = torch.randn(50, 3) if net.prior_dim else None
    rows = Rows(v, labels, torch.ones(50, 4, dtype=torch.bool), torch.ones(50), prior)
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
        if name != "STEM":
            np.testing.assert_allclose(found.weights.sum(1), 1, atol=1e-5)
        assert (found.gradients is None) == (layer.name in " ".join(report.notes))
