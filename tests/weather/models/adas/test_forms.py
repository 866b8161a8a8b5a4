import pytest
import torch
from torch import nn

from weather.experiments.experiment import Method, stored
from weather.models.adas.network import Adas
from weather.models.adas.presets import COMPARED, FORMS


@pytest.fixture
def build(small_adas):
    arguments = small_adas().arguments

    def of(form):
        torch.manual_seed(0)
        network = Adas(**{**arguments, **FORMS[form]})
        nn.init.normal_(network.recovery.surface.weight, std=0.1)
        return network

    return of


def inputs():
    x, y = torch.randn(2, 1, 3, 16, 32, generator=torch.Generator().manual_seed(0))
    c = (torch.rand(1, 3, 16, 32, generator=torch.Generator().manual_seed(1)) < 0.3).float()
    return x, y * c, c


def test_the_forms_have_the_same_parameters(build):
    shapes = [{n: p.shape for n, p in build(form).named_parameters()} for form in FORMS]
    assert all(shape == shapes[0] for shape in shapes)


def test_the_ungated_control_is_another_function_of_the_same_weights(build):
    gated, ungated = build("adas_increment"), build("ungated")
    ungated.load_state_dict(gated.state_dict())
    assert ungated.output == gated.output == "increment"
    difference = (gated(*inputs()) - ungated(*inputs())).std()
    assert difference > 1e-3 * gated(*inputs()).std()


def test_the_control_still_reads_the_confidence(build):
    x, y, c = inputs()
    for form in COMPARED:
        network = build(form)
        assert not torch.allclose(network(x, y, c), network(x, y, torch.zeros_like(c)), atol=1e-6)


def test_with_open_gates_an_observation_of_zero_looks_like_none(build):
    x, y, c = inputs()
    network = build("open_gate")
    torch.testing.assert_close(network(x, y, c), network(x, y, torch.zeros_like(c)))
    assert not torch.allclose(network(x, y, c), network(x, 0 * y, c), atol=1e-6)


def test_only_the_official_form_returns_the_analysis():
    outputs = {form: changes["output"] for form, changes in FORMS.items()}
    assert outputs == {
        "adas_increment": "increment",
        "adas_official": "analysis",
        "ungated": "increment",
        "open_gate": "increment",
    }


def test_stored_settings_are_found_by_method_and_task():
    method = Method("oi", lambda _: None, {"scale": (0.01, 1.0), "length_km": (100.0, 400.0)})
    setting = {"scale": 0.2, "length_km": 300.0}
    assert stored({"oi@a": setting, "letkf@b": {}}, method, "a") == setting
    middle = stored({"oi@a": setting}, method, "b")
    assert middle == pytest.approx({"scale": 0.1, "length_km": 200.0})
