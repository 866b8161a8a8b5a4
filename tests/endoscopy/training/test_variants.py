import pytest
import torch

from endoscopy.experiments.sizers import VARIANTS, variant_of
from endoscopy.models import gate_parameters, tiny_resnet
from endoscopy.models.sizer import channels_of
from endoscopy.training.sizing_module import SizingModule
from endoscopy.training.targets import LogSize, ScaledMillimeters


@pytest.fixture
def module():
    return SizingModule(
        tiny_resnet(trunk_options={"widths": [4, 4, 8], "depths": [1, 1]}),
        LogSize(beta=0.3),
        learning_rate=0.02,
        clip=3.0,
        cut_offs_mm=(5.5, 9.5),
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_can_learn_and_keeps_the_configuration(name, module):
    made = variant_of(module, name)
    assert (made.learning_rate, made.clip, made.cut_offs) == (0.02, 3.0, module.cut_offs)
    assert made.model.arguments["trunk_options"] == module.model.arguments["trunk_options"]
    streams = {
        stream: torch.randn(2, channels, 16, 16)
        for stream, channels in channels_of(made.model.arguments["streams"]).items()
    }
    made.target.loss(made.model(streams), torch.tensor([4.0, 12.0])).backward()
    learning = {n: p for n, p in made.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in learning.values())
    assert bool(gate_parameters(made.model)) == (made.model.arguments["gates"] in ("fsg", "l0"))


def test_what_a_variant_changes(module):
    assert variant_of(module, "plain").gradient_routing == "off"
    assert not gate_parameters(variant_of(module, "plain").model)
    frozen = variant_of(module, "frozen")
    assert not any(p.requires_grad for p in gate_parameters(frozen.model).values())
    assert variant_of(module, "l0").l0_weight > 0
    assert list(variant_of(module, "crop").model.arguments["streams"]) == ["crop"]
    published = variant_of(module, "millimeters")
    assert isinstance(published.target, ScaledMillimeters)
    large = torch.tensor([12.0])
    assert published.target.weighted.weight(large) == 5
    assert published.gate_target.weighted.weight(large) == 10
    assert variant_of(module, "configured").target.smooth_l1.beta == 0.3


def test_settings_win_and_weights_are_drawn_anew(module):
    torch.manual_seed(0)
    first = variant_of(module, "dual", learning_rate=0.5)
    torch.manual_seed(0)
    same, other = variant_of(module, "dual"), variant_of(module, "dual")
    weights = [one.model.branches["rgb_mask"].conv1.weight for one in (first, same, other)]
    assert first.learning_rate == 0.5
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[0], module.model.branches["rgb_mask"].conv1.weight)


def test_an_unknown_variant_is_named(module, refused):
    refused(
        "'daul' is unknown; choose from configured, plain, dual",
        variant_of,
        module,
        "daul",
        error=ValueError,
    )
