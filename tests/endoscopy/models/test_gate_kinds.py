import pytest
import torch
from torch.testing import assert_close

from core_gates.features.selection import FeatureSelectionGate
from core_gates.surgery import gate_hosts
from endoscopy.models import gate_parameters, tiny_resnet, tiny_vit, weight_parameters
from endoscopy.models.trunks import LayerScale, Recalibration


def test_gates_and_weights_split_the_parameters():
    for kind in ("fsg", "l0", "layer_scale", "se", "none"):
        model = tiny_resnet(gates=kind, hidden_dim=8)
        gates, weights = gate_parameters(model), weight_parameters(model)
        everything = dict(model.named_parameters())
        assert gates.keys() | weights.keys() == everything.keys()
        assert not gates.keys() & weights.keys()
        assert len(gates) == (6 if kind in ("fsg", "l0") else 0)
        assert all(parameter is everything[name] for name, parameter in gates.items())


@pytest.mark.parametrize("kind", ["fsg", "l0", "layer_scale", "se"])
def test_every_kind_changes_what_the_network_computes_and_learns(kind):
    torch.manual_seed(0)
    model = tiny_resnet(gates=kind)
    images = {"rgb_mask": torch.randn(4, 4, 32, 32)}
    out = model(images)
    plain = tiny_resnet(gates="none")
    plain.load_state_dict(model.state_dict(), strict=False)
    if kind != "layer_scale":  # which starts at one
        assert not torch.allclose(plain(images), out, rtol=1e-3)
    out.square().sum().backward()
    added = [p for name, p in model.named_parameters() if ".gate." in name or ".attention." in name]
    assert len(added) >= 4
    assert all(p.grad.abs().max() > 0 for p in added)


def test_layer_scale_is_a_plain_product():
    scale = LayerScale(3, init=0.5, feature_dim=1)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    assert_close(scale(x), 0.5 * x)
    scale.logits.data = torch.tensor([-2.0, 0.0, 0.25])
    y = scale(x)
    assert_close(y, x * torch.tensor([-2.0, 0.0, 0.25]).view(1, 3, 1, 1))
    y.sum().backward()
    assert_close(scale.logits.grad, x.detach().sum((0, 2, 3)))
    assert scale.prune_(0.3) == 1
    assert torch.equal(scale.kept, torch.tensor([True, False, False]))


def test_layer_scale_starts_small_in_residual_branches_and_at_one_behind_stages():
    for build, start in ((tiny_vit, 1e-5), (tiny_resnet, 1.0)):
        scales = [m for m in build(gates="layer_scale").modules() if isinstance(m, LayerScale)]
        assert len(scales) >= 4
        assert all((scale.logits == start).all() for scale in scales)


def test_squeeze_and_excitation_is_its_equation():
    attention, tokens = Recalibration(32, 1), Recalibration(32, -1)
    tokens.load_state_dict(attention.state_dict())
    x = torch.randn(2, 32, 4, 4)
    first, second = attention.attention.fc1, attention.attention.fc2
    hidden = (x.mean((2, 3)) @ first.weight.flatten(1).mT + first.bias).relu()
    scores = (hidden @ second.weight.flatten(1).mT + second.bias).sigmoid()
    assert_close(attention(x), x * scores[..., None, None])
    assert_close(tokens(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), attention(x))
    assert_close(tokens(x.flatten(2).mT).mT.reshape(x.shape), attention(x))


def test_baselines_sit_where_the_gates_do():
    gated, attended = tiny_vit(gates="fsg"), tiny_vit(gates="se")
    places = {
        name.rpartition(".gate")[0]
        for name, m in gated.named_modules()
        if isinstance(m, FeatureSelectionGate)
    }
    assert places == {
        name.rpartition(".attention")[0]
        for name, m in attended.named_modules()
        if isinstance(m, Recalibration)
    }
    assert len(places) == len(gate_hosts(gated)) == 8
